"""The draft's KV goes; the target's, which may lie in the same tensor, never."""

from __future__ import annotations

import torch
from torch import nn

from aurora_vllm.spec_decode.draft_kv import DraftKv


class Layer(nn.Module):
    """Stands for vLLM's attention layer."""

    def __init__(self, kv_cache: object) -> None:
        super().__init__()
        self.kv_cache = kv_cache


def made(*caches: object) -> nn.Module:
    return nn.Sequential(nn.Linear(1, 1), *(Layer(cache) for cache in caches))


def test_only_the_draft_s_own_is_zeroed() -> None:
    memory = torch.ones(3, 4)  # one allocation for all layers
    draft, target = made(memory[2]), made(memory[0], memory[1])
    assert DraftKv(draft, target).drop()
    assert memory.sum(1).tolist() == [4.0, 4.0, 0.0]


def test_what_the_target_shares_stays() -> None:
    shared, own = torch.ones(4), torch.ones(4)
    assert not DraftKv(made(own, shared), made(torch.ones(4), shared)).drop()
    assert bool(shared.all()) and bool(own.all())


def test_caches_in_lists_and_caches_that_are_not_there_yet() -> None:
    one = torch.ones(4)
    assert DraftKv(made([one], torch.empty(0)), made(torch.empty(0))).drop()
    assert not one.any()
    assert not DraftKv(made(torch.empty(0)), made()).drop()


def test_tensors_made_for_inference_can_be_dropped() -> None:
    with torch.inference_mode():
        cache = torch.ones(4)
    assert DraftKv(made(cache), made()).drop()
    assert not cache.any()
