"""The live draft's weights, exchanged with a published version between two steps.

A swap is an *exchange*: every live tensor trades its content with a staged one. Addresses stay, so compiled code and
CUDA graphs stay valid, and exchanging once more is the rollback. On a GPU the copies are enqueued on the stream that is
current, the model's, so they come between two steps there too, and the host waits for nothing. All that is known to
fail (reading the bank, checksum, shape, dtype, finiteness, room, packing for the CPU) happens while staging, on another
thread; what fails in the exchange itself is undone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aurora_vllm.spec_decode.exchange import AcceleratorExchange, Exchange, HandlerExchange, Standing, TensorExchange
from aurora_vllm.spec_decode.exchange import StagedWeights as StagedWeights
from aurora_vllm.transport.bank import TensorSpec
from aurora_vllm.transport.waits import wait_for_this_stream


class SwapRefused(ValueError):
    """These weights cannot go into this draft. The text says which tensor and why; the live version stays."""


@dataclass(frozen=True)
class _Destination:
    """Where some checkpoint tensors live in vLLM's draft: stacked along dim 0 in this order."""

    sources: tuple[str, ...]
    module: Any
    parameter: str
    rows: int  # of the live tensor; a vocabulary padded by vLLM has more rows than the checkpoint
    columns: int | None  # None for vectors
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return " + ".join(self.sources)


class LiveDraft:
    """The running EAGLE-3 draft of one worker.

    Args:
        draft: vLLM's ``Eagle3LlamaForCausalLM`` (or a class of the same layout).
        target: the target model; used to notice shared modules only.

    Raises:
        SwapRefused: the draft shares its ``lm_head`` with the target, is quantised, or has a layer whose weights
            cannot be reached.
    """

    def __init__(self, draft: Any, target: Any) -> None:
        if _shares(draft.lm_head, getattr(target, "lm_head", None)):
            raise SwapRefused("the draft's lm_head is the target's own module; writing it would change the target")
        self._destinations = _destinations(draft)
        self._vocab_size = draft.config.vocab_size
        kinds = [_kind(destination) for destination in self._destinations]  # raises where weights cannot be reached
        self._parameters = [d for d, kind in zip(self._destinations, kinds, strict=True) if kind == "parameter"]
        self._addresses = [_live(destination).data_ptr() for destination in self._parameters]
        self._standing: dict[torch.dtype, Standing] = {}  # on an accelerator, from the first staging on
        self._room = torch.empty(0, dtype=torch.uint8)  # on a CPU, likewise

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Compare what a bank carries with what this draft has.

        Raises:
            SwapRefused: names the first tensor that is missing, unknown, or of another shape or dtype.
        """
        given = {spec.name: spec for spec in specs}
        wanted = {name for destination in self._destinations for name in destination.sources}
        if set(given) != wanted:
            different = ", ".join(sorted(set(given) ^ wanted))
            raise SwapRefused(f"the bank and the running draft have different tensors: {different}")
        for destination in self._destinations:
            parts = [given[name] for name in destination.sources]
            _check_shape(destination, [part.shape for part in parts], [part.dtype for part in parts])

    def rehearse(self, specs: Sequence[TensorSpec]) -> None:
        """On an accelerator: stage and exchange what is live already, while nothing is served.

        A GPU loads a kernel when it is first launched, for which the host waits until all that is queued is done; and
        where there is no room for the standing tensors, it shows now.

        Args:
            specs: of the bank, checked.
        """
        if not self._parameters or not _on_accelerator(_live(self._parameters[0])):
            return
        rows = {spec.name: spec.shape[0] for spec in specs}
        tensors: dict[str, torch.Tensor] = {}
        for destination in self._parameters:
            sizes = [rows[name] for name in destination.sources]
            parts = _live(destination)[: sum(sizes)].split(sizes)  # vLLM pads a vocabulary
            tensors |= zip(destination.sources, parts, strict=True)
        self.stage(0, tensors).exchange()

    def stage(self, version: int, tensors: Mapping[str, torch.Tensor]) -> StagedWeights:
        """Copy, check and pack a version, off the serving path. tensors: checkpoint names -> CPU or device tensors.

        Raises:
            SwapRefused: a tensor is missing, has another shape or dtype, or is not finite; or a live parameter is no
                longer where it was, so that captured graphs read something else.
        """
        for destination, address in zip(self._parameters, self._addresses, strict=True):
            if _live(destination).data_ptr() != address:
                raise SwapRefused(f"{destination.label}: the running draft's parameter has moved")
        exchanges: list[Exchange] = []
        there: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # live and staged, on an accelerator
        for destination in self._destinations:
            weight = self._checked(destination, tensors)
            if _kind(destination) == "onednn":
                from vllm import _custom_ops

                packed = _custom_ops.create_onednn_mm(weight.t(), 32)
                exchanges.append(HandlerExchange(_onednn_handler(destination.module), packed))
                continue
            live = _live(destination)
            if _on_accelerator(live):
                there.setdefault(live.dtype, []).append((live, weight.to(live.device)))
            else:
                exchanges.append(TensorExchange(live, weight.to(live.device), self._kept(live)))
        exchanges += [self._fuse(dtype, pairs) for dtype, pairs in there.items()]
        return StagedWeights(version, exchanges)

    def _checked(self, destination: _Destination, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A copy of what goes there, padded as the live tensor is. Raises SwapRefused."""
        missing = [name for name in destination.sources if name not in tensors]
        if missing:
            raise SwapRefused(f"{missing[0]}: not in the published version")
        parts = [tensors[name] for name in destination.sources]
        _check_shape(destination, [tuple(part.shape) for part in parts], [part.dtype for part in parts])
        weight = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        if weight.is_floating_point() and not _is_finite(weight):
            raise SwapRefused(f"{destination.label}: not finite")
        if destination.sources == ("d2t",):
            _check_vocabulary(weight, self._vocab_size)
        lacking = destination.rows - weight.shape[0]
        return torch.cat([weight, weight.new_zeros(lacking, *weight.shape[1:])]) if lacking else weight

    def _kept(self, live: torch.Tensor) -> torch.Tensor:
        """Room for one tensor's content while it is exchanged: as large as the largest, the same for all of them."""
        if not len(self._room):
            largest = max(_live(destination).nbytes for destination in self._parameters)
            self._room = torch.zeros(largest, dtype=torch.uint8)  # written to, so that its pages are there
        return self._room[: live.nbytes].view(live.dtype).view(live.shape)

    def _fuse(self, dtype: torch.dtype, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Exchange:
        """One exchange of all that is on an accelerator and of one dtype, which a fused copy takes; returns when what
        was staged there is there."""
        live, staged = [live for live, _ in pairs], [staged for _, staged in pairs]
        if dtype not in self._standing:
            self._standing[dtype] = Standing([tensor.clone() for tensor in live])
        wait_for_this_stream(live[0].device)  # this thread's, not the model's
        return AcceleratorExchange(live, staged, self._standing[dtype])


def _is_finite(weight: torch.Tensor) -> bool:
    """By the largest magnitude, which NaN outdoes: one pass, and no masks that take as much of a GPU as the weight."""
    return not weight.numel() or math.isfinite(torch.linalg.vector_norm(weight, math.inf))


def _on_accelerator(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def _live(destination: _Destination) -> torch.Tensor:
    """The live tensor of a destination that is a parameter."""
    found: torch.Tensor = getattr(destination.module, destination.parameter).data
    return found


def _shares(module: Any, other: Any) -> bool:
    if other is None:
        return False
    if module is other:
        return True
    mine, theirs = getattr(module, "weight", None), getattr(other, "weight", None)
    if mine is None or theirs is None or not mine.numel():
        return False
    return mine.data_ptr() == theirs.data_ptr()


def _destinations(draft: Any) -> list[_Destination]:
    """vLLM's parameters for each checkpoint tensor (llama_eagle3.py, ``hf_to_vllm_mapper`` read backwards)."""
    model, layer = draft.model, draft.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    prefix = "midlayer."
    linears: list[tuple[tuple[str, ...], Any]] = [
        (("fc.weight",), model.fc),
        (tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"), attention.qkv_proj),
        ((f"{prefix}self_attn.o_proj.weight",), attention.o_proj),
        (tuple(f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up")), mlp.gate_up_proj),
        ((f"{prefix}mlp.down_proj.weight",), mlp.down_proj),
        (("lm_head.weight",), draft.lm_head),
    ]
    norms: list[tuple[str, Any]] = [
        (f"{prefix}hidden_norm.weight", layer.hidden_norm),
        (f"{prefix}input_layernorm.weight", layer.input_layernorm),
        (f"{prefix}post_attention_layernorm.weight", layer.post_attention_layernorm),
        ("norm.weight", model.norm),
    ]
    optional = [
        ("input_norm.weight", getattr(model, "input_norm", None)),
        *((f"fc_norm.{i}.weight", module) for i, module in enumerate(getattr(model, "fc_norm", None) or ())),
        *((f"{prefix}self_attn.{name}_norm.weight", getattr(attention, f"{name}_norm", None)) for name in "qk"),
    ]
    norms += [(name, module) for name, module in optional if module is not None]
    found = []
    for sources, module in linears:
        if getattr(module, "bias", None) is not None:
            raise SwapRefused(f"{sources[0]}: a draft layer with a bias is not supported")
        rows, columns = _linear_shape(sources[0], module)
        found.append(_Destination(sources, module, "weight", rows, columns, module.weight.dtype))
    for name, module in norms:
        found.append(_Destination((name,), module, "weight", module.weight.shape[0], None, module.weight.dtype))
    mapping = getattr(draft, "draft_id_to_target_id", None)
    if mapping is not None:
        found.append(_Destination(("d2t",), draft, "draft_id_to_target_id", mapping.shape[0], None, mapping.dtype))
    return found


def _linear_shape(name: str, module: Any) -> tuple[int, int]:
    weight = getattr(module, "weight", None)
    method = type(getattr(module, "quant_method", None)).__name__
    if weight is None or not method.startswith("Unquantized"):
        raise SwapRefused(f"{name}: quantised draft layers ({method}) cannot be updated in place")
    if weight.numel():
        return weight.shape[0], weight.shape[1]
    handler = _onednn_handler(module)
    if handler is None:
        raise SwapRefused(f"{name}: vLLM repacked this layer in a way that is not known here")
    return handler.n, handler.k


def _onednn_handler(module: Any) -> Any | None:
    """The oneDNN handler in the closure of ``layer.cpu_linear`` (vllm dispatch_cpu_unquantized_gemm), if any."""
    for cell in getattr(getattr(module, "cpu_linear", None), "__closure__", None) or ():
        if type(cell.cell_contents).__name__ == "CPUDNNLGEMMHandler":
            return cell.cell_contents
    return None


def _kind(destination: _Destination) -> str:
    module = destination.module
    if destination.columns is None or not hasattr(module, "cpu_linear"):
        return "parameter"
    if _onednn_handler(module) is not None:
        return "onednn"
    if module.cpu_linear is torch.nn.functional.linear or not getattr(module.cpu_linear, "__closure__", None):
        return "parameter"  # vLLM's fallback multiplies by layer.weight itself
    raise SwapRefused(f"{destination.label}: vLLM repacked this layer in a way that is not known here")


def _check_shape(destination: _Destination, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
    for name, dtype in zip(destination.sources, dtypes, strict=True):
        if dtype != destination.dtype:
            raise SwapRefused(f"{name}: dtype {dtype}, the running draft has {destination.dtype}")
    rows = sum(shape[0] if shape else 0 for shape in shapes)
    columns = {shape[1:] for shape in shapes}
    wanted_columns = () if destination.columns is None else (destination.columns,)
    padded = destination.sources == ("lm_head.weight",)
    fits = rows <= destination.rows if padded else rows == destination.rows
    if columns != {wanted_columns} or not fits:
        got = " + ".join(str(list(shape)) for shape in shapes)
        raise SwapRefused(
            f"{destination.label}: shape {got}, the running draft has [{destination.rows}, {destination.columns}]"
        )


def _check_vocabulary(d2t: torch.Tensor, vocab_size: int) -> None:
    """vLLM scatters logits to these ids: one outside its vocabulary would raise in a step, two alike lose one."""
    ids = (d2t + torch.arange(len(d2t), device=d2t.device)).unique()
    if len(ids) < len(d2t) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise SwapRefused(f"d2t: not {len(d2t)} different ids of the target's {vocab_size}")
