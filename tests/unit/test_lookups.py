"""The comparison of both lookups: each goes through an answer to its end, and copies what was there before."""

from __future__ import annotations

import pytest
import torch

from aurora_vllm.learner.evaluate import Score
from benchmarks.lookups import OnDevice, Scheduler


def both(length: int) -> list[Scheduler | OnDevice]:
    return [Scheduler(length), OnDevice(length, torch.device("cpu"))]


@pytest.mark.parametrize("length", [3, 8])
def test_a_text_that_repeats_itself(length: int) -> None:
    """8 tokens of prompt, then the same ones twice: no copy before the third token of the answer."""
    text = [11, 12, 13, 14, 15, 16, 17, 18]
    for lookup in both(length):
        score = lookup.answer(text * 3, len(text))
        assert score.tokens in (15, 16)  # all but the first, which comes of the prompt; and perhaps one behind the end
        assert score.steps == 1 + -(-14 // (length + 1))


def test_an_answer_of_before_is_copied_and_a_prompt_is_not() -> None:
    for lookup in both(3):
        assert lookup.answer([1, 2, 3, 21, 22, 23, 24, 25], 3) == Score(4, (0, 0, 0))
        assert lookup.answer([4, 5, 6, 21, 22, 23, 24, 25], 3) == Score(2, (1, 1, 1))
        assert lookup.answer([7, 8, 1, 2, 3], 2).accepted == (0, 0, 0)
