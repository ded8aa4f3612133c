"""The average of the weights in training, against a plain sum, and what the curriculum makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.learner.averaging import YOUNG, WeightAverage
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.draft import Eagle3Draft
from tests.unit import test_curriculum
from tests.unit.test_lesson import day0_draft, linear_world


def weights(draft: Eagle3Draft) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in draft.parameters()])


@settings(max_examples=20)
@given(decay=st.floats(0.5, 0.999), steps=st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_it_is_the_weighted_sum_of_where_training_was(decay: float, steps: list[float]) -> None:
    draft, _ = day0_draft()
    average = WeightAverage(draft, decay)
    wanted = weights(draft).double()
    for n, moved in enumerate(steps, 1):
        with torch.no_grad():
            for parameter in average.trained.parameters():
                parameter += moved
        average.update()
        share = 1 - min(decay, (1 + n) / (YOUNG + n))
        wanted = wanted + share * (weights(average.trained).double() - wanted)
    torch.testing.assert_close(weights(draft).double(), wanted, atol=1e-3, rtol=1e-3)


def test_what_is_not_trained_is_not_moved() -> None:
    draft, _ = day0_draft()
    average = WeightAverage(draft, 0.9)
    fc = draft.fc.weight.detach().clone()
    for parameter in average.trained.parameters():
        parameter.requires_grad_(parameter is average.trained.lm_head.weight)
        parameter.data += 1.0
    average.update()
    assert torch.equal(draft.fc.weight, fc)
    assert not torch.equal(draft.lm_head.weight, average.trained.lm_head.weight)


def test_without_one_the_draft_in_training_is_what_is_served() -> None:
    draft, _ = day0_draft()
    average = WeightAverage(draft, 0.0)
    assert average.trained is draft
    average.update()
    average.restart()


@pytest.mark.parametrize(("changes", "averages"), [({}, True), ({"semantics": "aurora-release"}, False)])
def test_training_moves_the_candidate_by_less_than_it_moves(
    tmp_path: Path, changes: dict[str, object], averages: bool
) -> None:
    draft, head = day0_draft()
    start = draft.lm_head.weight.detach().clone()
    curriculum = Curriculum(
        draft, head, test_curriculum.settings(batch_tokens=30, **changes), tmp_path, worth_keeping=True
    )
    for one in linear_world(head, draft.norm.weight.detach().clone(), 4, 30):
        curriculum.add(one)
    test_curriculum.do_all(curriculum)
    trained = curriculum.trainer.draft
    assert (trained is not draft) == averages
    moved, went = (float((one.lm_head.weight.detach() - start).norm()) for one in (draft, trained))
    assert 0 < moved < went if averages else moved == went

    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in draft.state_dict().items()}
    draft.load_state_dict(other)
    curriculum.go_on()
    for name, tensor in trained.state_dict().items():  # the average of what was before is gone
        assert torch.equal(tensor, other[name])
