"""Which drafts can take the closed-form lesson, and how many heads a draft gets for it."""

from __future__ import annotations

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.eagle3_config import Eagle3Config

# Of one column of the regression: the normal equations then take 600 MB in float32. With a key-value head for each
# query head, a wider target's draft would also take much of vLLM's KV cache (docs/decisions.md).
MAX_UNKNOWNS = 12_288


def unknowns(hidden_size: int, num_heads: int, head_dim: int, num_aux: int) -> int:
    """Unknowns of one column of the regression, for a draft with this many key-value heads; 0 if it gets no lesson.

    Without those of induction heads if all heads are needed for one value per channel, or if they would be too many.
    """
    own = -(-hidden_size // head_dim)
    if num_heads < own:
        return 0
    for parts in (num_aux + 3, num_aux + 2) if num_heads > own else (num_aux + 2,):
        if parts * hidden_size <= MAX_UNKNOWNS:
            return parts * hidden_size
    return 0


def heads_for(hidden_size: int, num_heads: int, head_dim: int, key_value_heads: int, num_aux: int) -> int | None:
    """Heads of a draft that is to have lessons, the same number for queries as for keys and values; None if it gets
    none.

    With induction heads the number is a multiple of the target's key-value heads, because vLLM requires the page size
    of one layer's KV cache to be a multiple of another's; and a divisor of the hidden size, because transformers
    accepts no other Llama configuration. If there is no such number, or too many unknowns, it is the target's number of
    heads.

    Args:
        hidden_size, num_heads, head_dim, key_value_heads: the target's.
        num_aux: auxiliary states that the draft reads.
    """
    own = -(-hidden_size // head_dim)
    if (num_aux + 3) * hidden_size <= MAX_UNKNOWNS:
        least = (-(-own // key_value_heads) + 1) * key_value_heads
        for heads in range(least, 2 * max(own, key_value_heads) + 1, key_value_heads):
            if hidden_size % heads == 0:
                return max(heads, num_heads)
    return num_heads if unknowns(hidden_size, num_heads, head_dim, num_aux) else None


def unknowns_of(config: Eagle3Config) -> int:
    """The same for an existing draft."""
    return unknowns(config.hidden_size, config.num_key_value_heads, config.head_dim, config.num_aux_hidden_states)


def is_due(draft: Eagle3Draft) -> bool:
    """Whether this is an untrained day-0 draft of a shape that can take the lesson."""
    config, weight = draft.config, draft.fc.weight.detach().cpu()
    hidden = config.hidden_size
    untaught = bool((weight[:, :-hidden] == 0).all()) and torch.equal(weight[:, -hidden:], torch.eye(hidden))
    return untaught and _is_plain(config) and unknowns_of(config) > 0


def _is_plain(config: Eagle3Config) -> bool:
    plain = not (config.norm_before_fc or config.fc_norm or config.norm_output or config.norm_before_residual)
    alike = config.num_key_value_heads == config.num_attention_heads
    return plain and alike and config.target_hidden_size == config.hidden_size
