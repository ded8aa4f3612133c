"""Workarounds in a loaded worker for what vLLM gets wrong beside drafts, for AuroraWorker and for a fork alike."""

from __future__ import annotations

from typing import Any

from aurora_vllm.spec_decode.lora import read_plain_embeddings
from aurora_vllm.spec_decode.sampling_fix import mend_cpu_sampling
from aurora_vllm.spec_decode.undrafted import add_logits_processors


def mend(worker: Any) -> None:
    """Apply them. worker: vLLM's, its model loaded and nothing compiled."""
    runner = worker.model_runner
    if hasattr(runner, "drafter"):  # V1; V2's sampling code is another one, without these faults
        if worker.device.type == "cpu":
            mend_cpu_sampling()
        add_logits_processors(runner)
    if worker.vllm_config.lora_config is not None:
        read_plain_embeddings(runner.get_draft_model())
