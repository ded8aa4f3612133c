"""A draft moved to another vocabulary: every token keeps its row of ``lm_head`` and its moments, wherever it goes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.ridge import regress
from aurora_vllm.learner.target import TargetHead

ROWS_FOR_TURN = 2  # times the hidden size: with fewer, rows are taken for moved alike
TURN_RIDGE = 1e-4  # relative to the mean square of a channel


@torch.no_grad()
def plan_move(
    draft: Eagle3Draft, head: TargetHead, target_ids: torch.Tensor, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], int]:
    """Work out what a draft is in another vocabulary: all that may fail or find no memory, so that several drafts can
    be moved together or not at all. Nothing else of the draft changes, and no tensor changes its address.

    A token of both vocabularies takes its row of ``lm_head`` along, and with it its row of every optimizer state of
    that shape (AdamW: both moments). A new token's moments are zero, its row is where :func:`_starting_rows` puts it.

    Args:
        draft: the draft.
        head: the target's embedding and lm_head.
        target_ids: int64 [D], the new vocabulary: as many target ids as the draft has now, none twice.
        optimizer: that trains the draft.

    Returns:
        What makes the move, once, and says how many tokens are new.

    Raises:
        ValueError: no such vocabulary.
        RuntimeError: there is no memory for it.
    """
    old, vocab_size = draft.target_ids, draft.config.vocab_size
    target_ids = target_ids.to(old.device)
    distinct = target_ids.unique()
    if target_ids.shape != old.shape or len(distinct) < len(old):
        raise ValueError(f"this draft's vocabulary is {len(old)} different target ids, not {len(distinct)}")
    if int(distinct[0]) < 0 or int(distinct[-1]) >= vocab_size:
        raise ValueError(
            f"target ids lie between 0 and {vocab_size - 1}, not {int(distinct[0])} to {int(distinct[-1])}"
        )
    row_of = torch.full((vocab_size,), -1, dtype=torch.int64, device=old.device)
    row_of[old] = torch.arange(len(old), device=old.device)
    source = row_of[target_ids]  # int64 [D], the row a token had; -1 where it is new
    new = source < 0

    def moved(rows: torch.Tensor, start: torch.Tensor | float) -> torch.Tensor:
        result = rows[source.clamp(min=0)]
        result[new] = start
        return result

    weight = draft.lm_head.weight
    states = (optimizer.state.get(weight, {}) if optimizer is not None else {}).values()
    moments = [state for state in states if isinstance(state, torch.Tensor) and state.shape == weight.shape]
    copies = [(weight, moved(weight, _starting_rows(draft, head, target_ids[new])))]
    copies += [(state, moved(state, 0.0)) for state in moments]
    copies.append((draft.d2t, target_ids - torch.arange(len(old), device=old.device)))
    entering = int(new.sum())

    @torch.no_grad()
    def move() -> int:
        for tensor, content in copies:
            tensor.copy_(content)
        weight.grad = None
        return entering

    return move


def _starting_rows(draft: Eagle3Draft, head: TargetHead, new_ids: torch.Tensor) -> torch.Tensor:
    """Rows for tokens the draft never had: the target's, taken where the draft's own rows went from theirs.

    A lesson turns all rows (lesson.py), and training moves their mean: softmax does not see a vector that is added to
    every row, so nothing holds it in place, and AdamW, which gives rows of rare tokens steps as long as those of
    frequent ones, moves it far. A bare row of the target would stand apart from all of them. Measured on SmolLM2-135M
    after 40 steps on HumanEval, 309 new tokens: rows have moved by 0.25 in the mean, their mean by 0.18; six steps
    later the held-out loss is 4.25 with it and 4.32 without, the acceptance length 1.234 and 1.215.

    So own row - mean ~ (target's row - mean) T, by least squares. A draft of another width starts a new token at the
    mean of its own rows. int64 [n] -> float32 [n, H]
    """
    own, theirs = draft.lm_head.weight, head.lm_head
    if own.shape[1] != theirs.shape[1]:
        return own.mean(0).expand(len(new_ids), -1)
    known = theirs[draft.target_ids].float()
    mean, moved_mean = known.mean(0), own.mean(0)
    known = known - mean
    turn = torch.eye(own.shape[1], device=own.device)
    if len(known) >= ROWS_FOR_TURN * own.shape[1]:
        turn = regress(known, own - moved_mean, TURN_RIDGE)
    return (theirs[new_ids].float() - mean) @ turn + moved_mean
