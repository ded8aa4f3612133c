"""Simulated speculation against a server that is walked through token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.evaluate import Recent, Score, accepted_prefix, simulate
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory
from tests.unit.naive_eagle3 import Sizes, naive_logits, random_case


@torch.no_grad()
def propose(draft: Eagle3Draft, head: TargetHead, batch: Batch, row: int, length: int) -> list[int]:
    """K drafts behind a row, one by one: each reads the drafts before it, whatever the target said there."""
    drafts: list[int] = []
    for step in range(length):
        rows = row + 2 + step
        ids = torch.cat([batch.input_ids[:, : row + 2], torch.tensor([drafts], dtype=torch.int64)], 1)
        states = torch.cat([batch.aux[:, : row + 1], torch.zeros(1, step + 1, batch.aux.shape[-1])], 1)  # none known
        positions = batch.positions[:, :1] + torch.arange(rows)
        seen = replace(batch, input_ids=ids, aux=states, positions=positions)
        logits = naive_logits(draft, head, seen, step + 1)[step][0, row]
        drafts.append(int(draft.target_ids[logits.argmax()]))
    return drafts


def walk(draft: Eagle3Draft, head: TargetHead, batch: Batch, first: int, length: int) -> tuple[dict[int, int], Score]:
    """What a server would do from row ``first`` on: accepted drafts by row, and the score."""
    tokens = batch.input_ids[0].tolist()
    prefix, counts, row, steps = {}, [0] * length, first, 0
    while row + 1 + length < len(tokens):  # a verification all of whose tokens are known
        drafts = propose(draft, head, batch, row, length)
        accepted = 0
        while accepted < length and drafts[accepted] == tokens[row + 2 + accepted]:
            counts[accepted] += 1
            accepted += 1
        prefix[row] = accepted
        steps += 1
        row += accepted + 1
    return prefix, Score(steps, tuple(counts))


def case(rows: int, prompt: int, start: int, seed: int, obedient: float) -> tuple[Eagle3Draft, TargetHead, Batch]:
    """A trajectory in which the target often says what the draft proposes."""
    sizes = Sizes([rows], [prompt], vocab=5, draft_vocab=4, start=start)
    draft, head, batch = random_case(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    for row in range(rows - 2):
        if torch.rand((), generator=generator) < obedient:
            batch.input_ids[0, row + 2] = propose(draft, head, batch, row, 1)[0]
    return draft, head, batch


def as_trajectory(batch: Batch, prompt_length: int) -> Trajectory:
    start = int(batch.positions[0, 0])
    return Trajectory(
        request=1,
        start=start,
        token_ids=batch.input_ids[0],
        aux=batch.aux[0],
        last=batch.last[0],
        prompt_length=prompt_length,
        draft_version=1,
        temperature=0.0,
    )


@settings(max_examples=60)
@given(
    rows=st.integers(1, 12),
    prompt=st.integers(0, 14),
    start=st.sampled_from([0, 3]),
    length=st.integers(1, 4),
    seed=st.integers(0, 999),
    obedient=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_simulation_is_the_walk(rows: int, prompt: int, start: int, length: int, seed: int, obedient: float) -> None:
    draft, head, batch = case(rows, prompt, start, seed, obedient)
    trajectory = as_trajectory(batch, prompt)
    first = max(0, prompt - 1 - start)  # the prompt's last row: its next token is the first that was emitted
    wanted, score = walk(draft, head, batch, first, length)
    assert simulate(draft, head, trajectory, length) == score

    found_first, prefix = accepted_prefix(draft, head, trajectory, length)
    assert found_first == first
    assert len(prefix) == max(0, rows - 1 - length - first)
    for row, accepted in wanted.items():
        assert int(prefix[row - first]) == accepted


def test_walks_that_meet_every_kind_of_verification() -> None:
    """Drafts accepted none, some and all, and right ones behind wrong ones, whatever hypothesis finds above."""
    total = Score(0, (0, 0, 0))
    for seed in range(30):
        draft, head, batch = case(12, 2, 0, seed, 0.7)
        score = simulate(draft, head, as_trajectory(batch, 2), 3)
        assert score == walk(draft, head, batch, 1, 3)[1]
        total += score
    assert 0 < total.accepted[2] < total.accepted[1] < total.accepted[0] < total.steps
    assert total.acceptance_length == pytest.approx(total.tokens / total.steps)


def test_scores_add_up() -> None:
    one, two = Score(4, (3, 1)), Score(6, (2, 2))
    assert one + two == Score(10, (5, 3))
    assert (one + two).acceptance_length == 1.8 and (one + two).tokens == 18
    empty = Score(0, (0, 0))
    assert empty.acceptance_length == 1.0 and one + empty == one


def test_recent_forgets() -> None:
    recent = Recent(2, memory=100)
    assert recent.per_position() == [0.0, 0.0]
    recent.add(Score(100, (100, 50)))
    assert recent.per_position() == [1.0, 0.5]
    for _ in range(40):
        recent.add(Score(10, (0, 0)))
    assert 0 < recent.per_position()[0] < 0.02
    assert recent.steps == pytest.approx(100, abs=3)  # what it remembers
    recent.add(Score(1000, (500, 250)))  # more than it can remember: everything before is gone
    assert recent.per_position() == [0.5, 0.25]
