"""Repairs for two faults of speculative sampling in vLLM's V1 runner.

1. On a CPU, vLLM's stand-in for ``expand_kernel`` writes into a temporary and loses it (vllm#55005), so the rejection
   sampler reads each request's temperature, top-k and top-p from uninitialised memory. A probe runs the real function
   first: where upstream has fixed it, nothing is replaced.
2. With a draft configured, every step goes through the rejection sampler, even one without drafts. That costs time, and
   on a CPU a request with ``top_k`` ends the engine ("max(): Expected reduction dim ...": the maximum of no values).
   Such a step is sent to the plain sampler, with the arguments that the rejection sampler itself uses for the token
   after the drafts (``predict_bonus_token``; without it a thinking budget is applied to another request).
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch

logger = logging.getLogger("vllm.aurora")


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Repeat each request's value for each of its tokens, like vLLM's function of that name.

    Args:
        x: [batch], any dtype.
        cu_num_tokens: [batch] integer, cumulative number of tokens.
        num_tokens: total number of tokens.
        replace_from, replace_to: values equal to the first are replaced by the second.

    Returns:
        [num_tokens], dtype of x.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype, device=x.device), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def loses_its_output(function: object) -> bool:
    """Whether an ``expand_batch_to_tokens`` returns other values than it was given."""
    assert callable(function)
    cu_num_tokens = torch.tensor([2, 3], dtype=torch.int32)
    for value in (0.25, 7.5):  # two values, because uninitialised memory may be right by chance once
        got = function(torch.tensor([value, 0.0]), cu_num_tokens, 3, replace_from=0, replace_to=1)
        if got.tolist() != [value, value, 1.0]:
            return True
    return False


def mend_cpu_sampling() -> bool:
    """Replace vLLM's function where it is broken. Returns whether it was."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.expand_batch_to_tokens
    if not loses_its_output(original):
        return False

    @functools.wraps(original)  # so that a probe still finds vLLM's source behind it
    def mended(*args: Any, **kwargs: Any) -> torch.Tensor:
        return expand_batch_to_tokens(*args, **kwargs)

    rejection_sampler.expand_batch_to_tokens = mended
    logger.info("aurora: replaced vLLM's expand_batch_to_tokens on the CPU, which loses its output (vllm#55005)")
    return True


def sample_plainly_without_drafts(runner: Any) -> None:
    """Wrap a V1 runner's ``_sample``, so that steps without drafts bypass the rejection sampler."""
    original, sampler = runner._sample, getattr(runner, "sampler", None)
    if sampler is None:
        return
    told = "predict_bonus_token" in inspect.signature(sampler.forward).parameters

    @functools.wraps(original)
    def sample(logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and any(spec_decode_metadata.num_draft_tokens):
            return original(logits, spec_decode_metadata)
        batch = runner.input_batch
        batch.update_async_output_token_ids()
        more = {"predict_bonus_token": True} if told else {}
        return sampler(logits=logits, sampling_metadata=batch.sampling_metadata, **more)

    runner._sample = sample
