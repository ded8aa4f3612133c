"""Cached prompts are forgotten when the running draft is another one, and only then."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from aurora_vllm.spec_decode.cached_prompts import CachedPrompts
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.segment import Segment


@dataclass
class Manager:
    """vLLM's KVCacheManager with four blocks, two of them cached."""

    evicted: list[set[int]] = field(default_factory=list)

    @property
    def block_pool(self) -> SimpleNamespace:
        hashes = (None, b"a", None, b"b")
        return SimpleNamespace(blocks=[SimpleNamespace(block_id=i, block_hash=h) for i, h in enumerate(hashes)])

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.evicted.append(block_ids)


def test_once_for_each_other_draft() -> None:
    with Segment.create("control", control_bytes()) as block:
        control, manager = ControlBlock.create(block), Manager()
        control.worker.live_lineage = 3
        prompts = CachedPrompts(control.worker, manager)
        prompts.look()
        assert not manager.evicted  # what it begins with cached nothing before
        for lineage, times in ((4, 1), (4, 1), (3, 2)):  # a rollback is a change, too
            control.worker.live_lineage = lineage
            prompts.look()
            assert manager.evicted == times * [{1, 3}]


def test_a_vllm_that_keeps_its_blocks_elsewhere_serves_on(caplog: pytest.LogCaptureFixture) -> None:
    with Segment.create("control", control_bytes()) as block:
        control = ControlBlock.create(block)
        prompts = CachedPrompts(control.worker, SimpleNamespace())
        control.worker.live_lineage = 2
        prompts.look()
        assert "forgetting cached prompts failed" in caplog.text
