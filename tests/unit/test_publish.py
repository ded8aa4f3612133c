"""Nothing is published that does not win."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.learner.evaluate import Score
from aurora_vllm.learner.publish import Evidence


def score(steps: int, accepted: int) -> Score:
    return Score(steps, (accepted, 0, 0))


def evidence(min_tokens: int = 100, margin: float = 0.02, interval: float = 10.0) -> Evidence:
    return Evidence(min_tokens, margin, interval, 3)


def test_a_clear_winner_is_published_once_there_is_enough_evidence() -> None:
    judge = evidence()
    judge.add(score(40, 20), score(50, 5))
    assert not judge.verdict(0.0).publish
    judge.add(score(40, 20), score(50, 5))
    verdict = judge.verdict(0.0)
    assert verdict.publish
    assert verdict.candidate == 1.5
    assert verdict.incumbent == 1.1


def test_a_tie_or_a_win_within_the_margin_is_not() -> None:
    for candidate in (score(100, 10), score(100, 11)):
        judge = evidence()
        judge.add(candidate, score(100, 10))
        assert not judge.verdict(0.0).publish


def test_not_twice_within_the_interval_and_evidence_starts_over() -> None:
    judge = evidence()
    judge.add(score(100, 50), score(100, 10))
    assert judge.verdict(5.0).publish
    assert judge.published(5.0) == score(100, 50)
    judge.add(score(100, 90), score(100, 50))
    assert "less than" in judge.verdict(14.0).reason
    assert judge.verdict(15.0).publish


def test_old_evidence_is_forgotten() -> None:
    judge = evidence()
    judge.add(score(100, 0), score(100, 50))  # the candidate was bad long ago
    for _ in range(3):
        judge.add(score(60, 40), score(80, 20))
    assert judge.verdict(0.0).publish


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1)), max_size=30))
def test_publishes_only_what_beats_the_incumbent_on_enough_tokens(trajectories: list[tuple[int, float, float]]) -> None:
    judge = evidence()
    for steps, ours, theirs in trajectories:
        judge.add(score(steps, int(steps * ours)), score(steps, int(steps * theirs)))
        verdict = judge.verdict(0.0)
        if verdict.publish:
            assert verdict.tokens >= 100
            assert verdict.candidate >= verdict.incumbent + 0.02
