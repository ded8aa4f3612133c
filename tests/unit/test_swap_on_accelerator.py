"""The swap on plain parameters. On a GPU: one fused copy, addresses kept, the old version kept without a copy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from aurora_vllm.spec_decode import swap
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.exchange import AcceleratorExchange, StagedWeights
from aurora_vllm.spec_decode.swap import LiveDraft
from aurora_vllm.transport.bank import TensorSpec

H, MLP, VOCABULARY, PADDED = 8, 12, 10, 16


class UnquantizedLinearMethod: ...


def linear(rows: int, columns: int) -> Any:
    weight = nn.Parameter(torch.randn(rows, columns), requires_grad=False)
    return SimpleNamespace(weight=weight, bias=None, quant_method=UnquantizedLinearMethod())


def norm() -> Any:
    return SimpleNamespace(weight=nn.Parameter(torch.randn(H), requires_grad=False))


def make_draft() -> Any:
    """The parameters of vLLM's Eagle3LlamaForCausalLM, fused as there, with a padded vocabulary."""
    layer = SimpleNamespace(
        self_attn=SimpleNamespace(qkv_proj=linear(2 * H, 2 * H), o_proj=linear(H, H)),
        mlp=SimpleNamespace(gate_up_proj=linear(2 * MLP, H), down_proj=linear(H, MLP)),
        hidden_norm=norm(),
        input_layernorm=norm(),
        post_attention_layernorm=norm(),
    )
    return SimpleNamespace(
        model=SimpleNamespace(layers=[layer], fc=linear(H, 3 * H), norm=norm()),
        lm_head=linear(PADDED, H),
        draft_id_to_target_id=nn.Parameter(torch.zeros(VOCABULARY, dtype=torch.int64), requires_grad=False),
        config=SimpleNamespace(vocab_size=50),
    )


SHAPES = {
    "fc.weight": (H, 3 * H),
    "midlayer.self_attn.q_proj.weight": (H, 2 * H),
    "midlayer.self_attn.k_proj.weight": (H // 2, 2 * H),
    "midlayer.self_attn.v_proj.weight": (H // 2, 2 * H),
    "midlayer.self_attn.o_proj.weight": (H, H),
    "midlayer.mlp.gate_proj.weight": (MLP, H),
    "midlayer.mlp.up_proj.weight": (MLP, H),
    "midlayer.mlp.down_proj.weight": (H, MLP),
    "lm_head.weight": (VOCABULARY, H),
    "midlayer.hidden_norm.weight": (H,),
    "midlayer.input_layernorm.weight": (H,),
    "midlayer.post_attention_layernorm.weight": (H,),
    "norm.weight": (H,),
}


def version(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return tensors | {"d2t": torch.full((VOCABULARY,), number)}


def contents(draft: Any) -> dict[str, torch.Tensor]:
    layer = draft.model.layers[0]
    live = {
        "fc": draft.model.fc.weight,
        "qkv": layer.self_attn.qkv_proj.weight,
        "o": layer.self_attn.o_proj.weight,
        "gate_up": layer.mlp.gate_up_proj.weight,
        "down": layer.mlp.down_proj.weight,
        "lm_head": draft.lm_head.weight,
        "norms": torch.stack(
            [layer.hidden_norm.weight, layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        ),
        "norm": draft.model.norm.weight,
        "d2t": draft.draft_id_to_target_id,
    }
    return {name: tensor.detach().clone() for name, tensor in live.items()}


def assert_is_version(draft: Any, number: int) -> None:
    wanted, live = version(number), contents(draft)
    qkv = [wanted[f"midlayer.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(live["qkv"], torch.cat(qkv))
    assert torch.equal(live["gate_up"], torch.cat([wanted[f"midlayer.mlp.{n}_proj.weight"] for n in ("gate", "up")]))
    assert torch.equal(live["lm_head"][:VOCABULARY], wanted["lm_head.weight"])
    assert not live["lm_head"][VOCABULARY:].any()
    assert torch.equal(live["d2t"], wanted["d2t"])
    assert torch.equal(live["fc"], wanted["fc.weight"])
    assert torch.equal(live["norm"], wanted["norm.weight"])


@pytest.fixture
def draft(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(swap, "_on_accelerator", lambda tensor: True)
    torch.manual_seed(0)
    return make_draft()


def test_back_and_forth(draft: Any) -> None:
    """First version, second, back to the first, back to the second; and from the first back to the checkpoint."""
    checkpoint = contents(draft)
    live = LiveDraft(draft, target=SimpleNamespace(lm_head=linear(4, H)))
    live.check([TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in version(1).items()])
    address = draft.model.fc.weight.data_ptr()
    first = live.stage(1, version(1))
    assert [type(exchange) for exchange in first.exchanges] == [AcceleratorExchange] * 2  # floats, and d2t
    second = live.stage(2, version(2))  # staged while neither is live
    for staged, number in ((first, 1), (second, 2), (second, 1), (second, 2), (second, 1)):
        staged.exchange()
        assert_is_version(draft, number)
    third = live.stage(3, version(3))
    third.exchange()
    assert_is_version(draft, 3)
    third.exchange()
    assert_is_version(draft, 1)
    first.exchange()  # its other side is still the checkpoint
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in contents(draft).items())
    assert draft.model.fc.weight.data_ptr() == address


def test_back_and_forth_on_a_cpu_where_nothing_is_allocated_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make_draft()
    live = LiveDraft(draft, target=None)
    first, second = live.stage(1, version(1)), live.stage(2, version(2))
    rooms = {exchange.kept.untyped_storage().data_ptr() for exchange in (*first.exchanges, *second.exchanges)}  # type: ignore[attr-defined]
    assert len(rooms) == 1  # as large as the largest
    with monkeypatch.context() as step:
        for forbidden in ("clone", "contiguous", "to"):
            step.setattr(torch.Tensor, forbidden, lambda *args, **kwargs: pytest.fail("no copies"))
        first.exchange()
        second.exchange()
    assert_is_version(draft, 2)
    second.exchange()
    assert_is_version(draft, 1)


def test_a_rehearsal_leaves_everything_as_it_was(draft: Any) -> None:
    draft.draft_id_to_target_id.data.copy_(torch.arange(VOCABULARY))
    draft.lm_head.weight.data[VOCABULARY:] = 0.0
    live, before = LiveDraft(draft, target=None), contents(draft)
    live.rehearse([TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in version(1).items()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in contents(draft).items())
    first = live.stage(1, version(1))
    first.exchange()
    assert_is_version(draft, 1)
    first.exchange()
    assert all(torch.equal(tensor, before[name]) for name, tensor in contents(draft).items())


def test_a_swap_copies_every_byte_once_and_allocates_nothing(draft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = torch._foreach_copy_

    def counted(live: list[torch.Tensor], staged: list[torch.Tensor], non_blocking: bool) -> None:
        copied.append(sum(tensor.nbytes for tensor in live))
        copy(live, staged, non_blocking)

    staged: StagedWeights = LiveDraft(draft, target=None).stage(1, version(1))
    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    for forbidden in ("clone", "contiguous", "to"):
        monkeypatch.setattr(torch.Tensor, forbidden, lambda *args, **kwargs: pytest.fail("no copies"))
    staged.exchange()
    monkeypatch.undo()
    total = sum(tensor.nbytes for tensor in version(1).values()) + (PADDED - VOCABULARY) * H * 4
    assert sum(copied) == total
    assert len(copied) == 2


def test_what_is_not_finite_is_refused(draft: Any) -> None:
    live = LiveDraft(draft, target=None)
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensors = version(1)
        tensors["midlayer.self_attn.k_proj.weight"][3, 7] = bad
        with pytest.raises(SwapRefused, match=r"k_proj\.weight .*: not finite"):
            live.stage(1, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_number_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 33).to(dtype)
    weight[1, 1] = torch.finfo(dtype).max
    assert swap._is_finite(weight) and swap._is_finite(weight[0]) and swap._is_finite(weight[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (69, 32), (35, 16)):
            spoilt = weight.clone()
            spoilt[place] = bad
            assert not swap._is_finite(spoilt)
            spoilt[2, 2] = float("inf")
            assert not swap._is_finite(spoilt)


def test_a_parameter_that_moved_is_noticed(draft: Any) -> None:
    live = LiveDraft(draft, target=None)
    draft.model.fc.weight = nn.Parameter(torch.randn(H, 3 * H), requires_grad=False)
    with pytest.raises(SwapRefused, match=r"fc\.weight: the running draft's parameter has moved"):
        live.stage(1, version(1))
