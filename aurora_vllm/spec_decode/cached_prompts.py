"""Forgets vLLM's cached prompts when the draft is replaced by an unrelated one.

A cached prompt holds the draft's keys and values, too, computed by the weights that ran then, for as long as it is
cached; a system prompt with which every request begins is cached for ever. Between versions that differ by gradient
steps this matters little. The weights of a lesson, or of a draft from disk, cannot use the old keys and values.
"""

from __future__ import annotations

import logging
from typing import Any

from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.transport.control import WorkerBlock

logger = logging.getLogger("vllm.aurora")


class CachedPrompts:
    """Evicts cached prompts when the running draft's lineage changes.

    Args:
        worker: the worker's part of the control block.
        manager: vLLM's ``KVCacheManager``.
    """

    def __init__(self, worker: WorkerBlock, manager: Any) -> None:
        self._worker, self._manager = worker, manager
        self._lineage = worker.live_lineage
        self._breaker = CircuitBreaker("forgetting cached prompts")

    def look(self) -> None:
        """Called before a step is scheduled; costs one look-up when there is nothing to do.

        If an idle server takes a version, the next step is scheduled before this notices, and its requests still get
        the cached prompts. Blocks in use stay; new requests just no longer find them.
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
