"""Where the tensors of a draft's checkpoint are in the EAGLE-3 draft that vLLM runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class SwapRefused(ValueError):
    """These weights cannot go into this draft; the message names the tensor. The live version stays."""


@dataclass(frozen=True)
class Destination:
    """A parameter of vLLM's, and the checkpoint tensors that it holds, stacked along dim 0 in this order."""

    sources: tuple[str, ...]
    module: Any
    parameter: str
    rows: int  # of the live tensor; a vocabulary padded by vLLM has more rows than the checkpoint
    columns: int | None  # None for vectors
    dtype: torch.dtype
    handler: Any | None = None  # vLLM's CPUDNNLGEMMHandler, which on a CPU holds the weights instead of the parameter

    @property
    def label(self) -> str:
        return " + ".join(self.sources)

    @property
    def live(self) -> torch.Tensor:
        """The live tensor; only where there is no handler."""
        found: torch.Tensor = getattr(self.module, self.parameter).data
        return found

    def check(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        """See that tensors fit, given one shape and dtype for each source.

        Raises:
            SwapRefused: they do not.
        """
        for name, dtype in zip(self.sources, dtypes, strict=True):
            if dtype != self.dtype:
                raise SwapRefused(f"{name}: dtype {dtype}, the running draft has {self.dtype}")
        rows = sum(shape[0] if shape else 0 for shape in shapes)
        columns = {shape[1:] for shape in shapes}
        wanted_columns = () if self.columns is None else (self.columns,)
        padded = self.sources == ("lm_head.weight",)
        fits = rows <= self.rows if padded else rows == self.rows
        if columns != {wanted_columns} or not fits:
            got = " + ".join(str(list(shape)) for shape in shapes)
            raise SwapRefused(f"{self.label}: shape {got}, the running draft has [{self.rows}, {self.columns}]")


def destinations_in(draft: Any) -> list[Destination]:
    """vLLM's parameters for each checkpoint tensor (llama_eagle3.py, ``hf_to_vllm_mapper`` read backwards).

    Args:
        draft: vLLM's ``Eagle3LlamaForCausalLM``, or a class of the same layout.

    Raises:
        SwapRefused: it is quantised, or has a layer whose weights are not accessible.
    """
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
    found = [_linear(sources, module) for sources, module in linears]
    for name, module in norms:
        found.append(Destination((name,), module, "weight", module.weight.shape[0], None, module.weight.dtype))
    mapping = getattr(draft, "draft_id_to_target_id", None)
    if mapping is not None:
        found.append(Destination(("d2t",), draft, "draft_id_to_target_id", mapping.shape[0], None, mapping.dtype))
    return found


def _linear(sources: tuple[str, ...], module: Any) -> Destination:
    name, weight = sources[0], getattr(module, "weight", None)
    method = type(getattr(module, "quant_method", None)).__name__
    if getattr(module, "bias", None) is not None:
        raise SwapRefused(f"{name}: a draft layer with a bias is not supported")
    if weight is None or not method.startswith("Unquantized"):
        raise SwapRefused(f"{name}: quantised draft layers ({method}) cannot be updated in place")
    handler = _onednn_handler(module)
    repacked = getattr(module, "cpu_linear", None)
    # vLLM's fallback, which has no closure, multiplies by layer.weight itself.
    plain = repacked is None or repacked is torch.nn.functional.linear or not getattr(repacked, "__closure__", None)
    if handler is None and not (plain and weight.numel()):
        raise SwapRefused(f"{name}: vLLM repacked this layer in a way that is not known here")
    rows, columns = weight.shape if weight.numel() else (handler.n, handler.k)  # type: ignore[union-attr]
    return Destination(sources, module, "weight", rows, columns, weight.dtype, handler)


def _onednn_handler(module: Any) -> Any | None:
    """The oneDNN handler in the closure of ``layer.cpu_linear`` (vllm dispatch_cpu_unquantized_gemm), if any."""
    for cell in getattr(getattr(module, "cpu_linear", None), "__closure__", None) or ():
        if type(cell.cell_contents).__name__ == "CPUDNNLGEMMHandler":
            return cell.cell_contents
    return None
