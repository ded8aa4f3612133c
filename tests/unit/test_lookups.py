"""The comparison of both lookups: each goes through an answer to its end, and copies what was there before."""

from __future__ import annotations

import pytest
import torch

from aurora_vllm.control.copy_counts import ORDERS
from aurora_vllm.learner.evaluate import Score
from benchmarks.lookups import OnDevice, Scheduler


def both(length: int) -> list[tuple[Scheduler | OnDevice, int]]:
    """Each lookup, and how many tokens have to match."""
    return [(Scheduler(length), 1), (OnDevice(length, torch.device("cpu")), min(ORDERS))]


@pytest.mark.parametrize("length", [3, 8])
def test_a_text_that_repeats_itself(length: int) -> None:
    """8 tokens of prompt, then the same ones twice: no copy before enough tokens of the answer match."""
    text = [11, 12, 13, 14, 15, 16, 17, 18]
    for lookup, needed in both(length):
        score = lookup.answer(text * 3, len(text))
        assert score.tokens in (15, 16)  # all but the first, which comes of the prompt; and perhaps one behind the end
        assert score.steps == needed - 1 + -(-(16 - needed) // (length + 1))


def test_an_answer_of_before_is_copied_and_a_prompt_is_not() -> None:
    for lookup, needed in both(3):
        assert lookup.answer([1, 2, 3, 21, 22, 23, 24, 25], 3) == Score(4, (0, 0, 0))
        assert lookup.answer([4, 5, 6, 21, 22, 23, 24, 25], 3) == Score(needed, (1, 1, 1))
        assert lookup.answer([7, 8, 1, 2, 3], 2).accepted == (0, 0, 0)
