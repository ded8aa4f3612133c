"""vLLM's prefix cache when the draft becomes another one: prompts in it are the old draft's, too.

A cached prompt brings the draft's keys and values along, by the weights that ran when it was computed, for as long as
it is cached; a system prompt that every request begins with is cached for ever. Between versions that differ by
gradient steps that matters little. A lesson's weights, or a draft loaded from disk, read them wrongly.
"""

from __future__ import annotations

import logging
from typing import Any

from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.transport.control import WorkerBlock

logger = logging.getLogger("vllm.aurora")


class CachedPrompts:
    """Lets vLLM forget them where the running draft's lineage is another one.

    Args:
        worker: the worker's part of the control block.
        manager: vLLM's ``KVCacheManager``.
    """

    def __init__(self, worker: WorkerBlock, manager: Any) -> None:
        self._worker, self._manager = worker, manager
        self._lineage = worker.live_lineage
        self._breaker = CircuitBreaker("forgetting cached prompts")

    def look(self) -> None:
        """Before a step is scheduled. One look-up when there is nothing to do.

        Where an idle server takes a version, the step that finds out was scheduled already: its requests still get
        what was cached. Blocks in use stay; they are only not found any more.
        """
        lineage = self._worker.live_lineage
        if lineage != self._lineage:
            self._lineage = lineage
            self._breaker.run(self._forget)

    def _forget(self) -> None:
        cached = {block.block_id for block in self._manager.block_pool.blocks if block.block_hash is not None}
        self._manager.evict_blocks(cached)
        if cached:
            logger.info("aurora: the draft is another one; %d cached blocks are forgotten", len(cached))
