"""The table of all vLLM symbols that are wrapped, subclassed or called; probes and manifests use it
(:mod:`.compat`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Hook:
    """A vLLM symbol that we wrap, subclass or call, and what we rely on."""

    symbol: str  # "module:qualified.name"
    parameters: tuple[str, ...] = ()
    why: str = ""
    uses: tuple[str, ...] = ()  # names of attributes in its source that we read or replace

    def unused(self, source: str) -> list[str]:
        """The names in ``uses`` that do not occur in this source text."""
        return [name for name in self.uses if not re.search(rf"\b{name}\b", source)]


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

V1_HOOKS = (
    Hook(
        f"{_RUNNER}.sample_tokens",
        (),
        "hook: the step's hidden states",
        uses=("execute_model_state", "hidden_states", "aux_hidden_states"),
    ),
    Hook(f"{_RUNNER}._sample", ("spec_decode_metadata",), "hook: the verdict"),
    Hook(
        f"{_RUNNER}.propose_draft_token_ids",
        ("scheduler_output",),
        "hook: which weights proposed; nothing at K=0",
        uses=("num_spec_tokens_to_schedule", "discard_request_mask"),
    ),
    Hook(f"{_RUNNER}._get_positions", (), "hook: token positions"),
    Hook(f"{_RUNNER}.get_draft_model", (), "swap: the live draft"),
    Hook(
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        "CPU sampling fix (vllm#55005)",
    ),
    Hook("vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor", (), "requests without drafts: min_p"),
    Hook("vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor", (), "requests without drafts: logit_bias"),
)

V2_HOOKS = (
    Hook(f"{_RUNNER_V2}.sample", ("hidden_states", "input_batch"), "hook: last hidden states and the verdict"),
    Hook(
        f"{_RUNNER_V2}.sample_tokens",
        (),
        "hook: samples once and proposes once in every step",
        uses=("num_spec_tokens_to_schedule",),
    ),
    Hook(
        "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator:TargetDependentARSpeculator.propose",
        (
            "aux_hidden_states", "num_sampled", "num_rejected", "dummy_run", "is_profile", "num_speculative_tokens",
        ),
        "hook: aux hidden states, which weights proposed, copies in their stead; nothing at K=0",
    ),
    Hook(f"{_SPECULATOR}.__init__", (), "hook: where drafts lie"),
    Hook(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        (
            "req_ids", "num_reqs", "num_tokens", "num_scheduled_tokens", "num_draft_tokens_per_req", "input_ids",
            "positions", "num_computed_tokens_np", "prefill_len_np", "has_prefill", "idx_mapping", "idx_mapping_np",
        ),
        "hook: the batch",
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.output:SamplerOutput",
        ("sampled_token_ids", "num_sampled"),
        "hook: the verdict",
    ),
    Hook("vllm.v1.worker.gpu.states:RequestState.__init__", (), "copies: where the requests' tokens lie"),
    Hook(
        "vllm.v1.worker.gpu.input_batch:post_update",
        ("all_token_ids", "total_len", "num_sampled"),
        "copies: tokens and lengths are up to date when drafts are proposed",
    ),
    Hook(f"{_RUNNER_V2}.get_draft_model", (), "swap: the live draft"),
    Hook(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
        ("scheduler_output",),
        "scheduler: drafts of overlapping steps",
    ),
)  # fmt: skip

COMMON_HOOKS = (
    Hook("vllm.v1.worker.gpu_worker:Worker.load_model", (), "worker: attach after it"),
    Hook("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", (), "worker: captures and swaps begin after it"),
    Hook("vllm.v1.worker.gpu_worker:Worker.execute_model", ("scheduler_output",), "worker: step boundary"),
    Hook("vllm.v1.worker.gpu_worker:Worker.shutdown", (), "worker: detach"),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks",
        ("block_ids",),
        "scheduler: prompts cached by another draft are forgotten",
    ),
    Hook(f"{_SCHEDULER}.add_request", ("request",), "scheduler: requests beside which nobody has drafts"),
    Hook(
        f"{_SCHEDULER}.schedule",
        (),
        "scheduler: step starts, with our draft length",
        uses=("dynamic_sd_lookup", "num_spec_tokens_to_schedule"),
    ),
    Hook(f"{_SCHEDULER}.update_from_output", ("scheduler_output",), "scheduler: step ends"),
    Hook(f"{_SCHEDULER}.update_draft_token_ids", ("draft_token_ids",), "scheduler: drafts arrive"),
    Hook(
        f"{_SCHEDULER}.make_spec_decoding_stats",
        ("num_draft_tokens", "num_accepted_tokens", "request_id"),
        "scheduler: verdicts, as vllm:spec_decode_* counts them",
    ),
    Hook(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        ("speculative_config",),
        "requests without drafts: min_p and logit_bias are not refused",
    ),
    Hook("vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM", (), "swap: the draft's layout"),
    Hook(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        ("layer",),
        "swap: how CPU weights are repacked",
    ),
    Hook("vllm._custom_ops:create_onednn_mm", ("weight",), "swap: packing weights for the CPU"),
)
HOOKS = (*V1_HOOKS, *V2_HOOKS, *COMMON_HOOKS)


def hooks_of(runner: Literal["V1", "V2"]) -> tuple[Hook, ...]:
    """The hooks that this model runner needs."""
    return (*(V1_HOOKS if runner == "V1" else V2_HOOKS), *COMMON_HOOKS)
