"""Speculative sampling above temperature 0 on a CPU, repaired from our side.

vLLM's CPU stand-in for ``expand_kernel`` writes into a temporary and loses it (vllm#55005), so the rejection sampler
reads each request's temperature, top-k and top-p from uninitialised memory. A probe runs the real function first: once
upstream is mended, nothing is replaced.
"""

from __future__ import annotations

import torch


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Repeat each request's value for each of its tokens; same contract as vLLM's function of that name.

    Args:
        x: [batch], any dtype.
        cu_num_tokens: [batch] integer, cumulative number of tokens.
        num_tokens: their total.
        replace_from, replace_to: values equal to the first become the second.

    Returns:
        [num_tokens], dtype of x.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype, device=x.device), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def loses_its_output(function: object) -> bool:
    """Whether an ``expand_batch_to_tokens`` returns something else than the values it was given."""
    assert callable(function)
    cu_num_tokens = torch.tensor([2, 3], dtype=torch.int32)
    for value in (0.25, 7.5):  # two values: uninitialised memory may be right once, not twice
        got = function(torch.tensor([value, 0.0]), cu_num_tokens, 3, replace_from=0, replace_to=1)
        if got.tolist() != [value, value, 1.0]:
            return True
    return False


def mend_cpu_sampling() -> bool:
    """Replace vLLM's function where it is broken. Returns whether it was."""
    from vllm.v1.sample import rejection_sampler

    if not loses_its_output(rejection_sampler.expand_batch_to_tokens):
        return False
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    return True
