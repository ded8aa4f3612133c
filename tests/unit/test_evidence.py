"""Nothing is published that does not win."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.learner.evaluate import Score
from aurora_vllm.learner.evidence import Evidence, PublishDecision, Sync


def score(steps: int, accepted: int) -> Score:
    return Score(steps, (accepted, 0, 0))


def evidence(min_tokens: int = 100, margin: float = 0.02, interval: float = 10.0) -> Evidence:
    return Evidence(min_tokens, margin, interval, 3)


def test_a_clear_winner_is_published_once_there_is_enough_evidence() -> None:
    judge = evidence()
    judge.add(score(40, 20), score(50, 5))
    assert not judge.decide(0.0).publish
    judge.add(score(40, 20), score(50, 5))
    decision = judge.decide(0.0)
    assert decision.publish
    assert decision.candidate == 1.5
    assert decision.incumbent == 1.1


def test_a_tie_or_a_win_within_the_margin_is_not() -> None:
    for candidate in (score(100, 10), score(100, 11)):
        judge = evidence()
        judge.add(candidate, score(100, 10))
        assert not judge.decide(0.0).publish


def test_without_a_margin_a_tie_is_no_win_either() -> None:
    for accepted, wins in ((10, False), (11, True)):
        judge = evidence(margin=0.0)
        judge.add(score(100, accepted), score(100, 10))
        assert judge.decide(0.0).publish == wins


def test_answers_too_short_to_judge_are_no_evidence() -> None:
    judge = evidence()
    for _ in range(1000):
        judge.add(score(0, 0), score(0, 0))
    assert len(judge._pairs) == 0
    judge.add(score(100, 50), score(100, 10))
    judge.add(score(0, 0), score(0, 0))
    assert len(judge._pairs) == 1 and judge.decide(0.0).publish


def test_not_twice_within_the_interval_and_evidence_starts_over() -> None:
    judge = evidence()
    judge.add(score(100, 50), score(100, 10))
    assert judge.decide(5.0).publish
    assert judge.candidate == score(100, 50)
    judge.published(5.0)
    judge.add(score(100, 90), score(100, 50))
    assert "less than" in judge.decide(14.0).reason
    assert judge.decide(15.0).publish


def test_a_new_candidate_does_not_win_by_the_scores_of_the_one_before() -> None:
    for start_over in (Evidence.restart, lambda judge: judge.published(-99.0)):
        judge = evidence()
        judge.add(score(100, 90), score(100, 10))
        assert judge.decide(0.0).publish
        start_over(judge)
        judge.add(score(100, 10), score(100, 10))
        decision = judge.decide(0.0)
        assert not decision.publish and (decision.candidate, decision.incumbent, decision.tokens) == (1.1, 1.1, 110)


def test_old_evidence_is_forgotten() -> None:
    judge = evidence()
    judge.add(score(100, 0), score(100, 50))  # the candidate was bad long ago
    for _ in range(3):
        judge.add(score(60, 40), score(80, 20))
    assert judge.decide(0.0).publish


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1)), max_size=30))
def test_publishes_only_what_beats_the_incumbent_on_enough_tokens(trajectories: list[tuple[int, float, float]]) -> None:
    judge = evidence()
    for steps, ours, theirs in trajectories:
        judge.add(score(steps, int(steps * ours)), score(steps, int(steps * theirs)))
        decision = judge.decide(0.0)
        if decision.publish:
            assert decision.tokens >= 100
            assert decision.candidate >= decision.incumbent + 0.02


def test_evidence_publishes_on_evidence_and_nothing_else() -> None:
    sync = Sync("evidence", 1)
    assert sync.reason(PublishDecision(False, "too little", 1.0, 1.0, 0), steps=10**6, requests=10**6) == ""
    assert sync.reason(PublishDecision(True, "it wins", 2.0, 1.0, 700), steps=0, requests=0) == "it wins"


@given(st.sampled_from(["steps", "requests"]), st.integers(1, 9), st.lists(st.integers(0, 4), max_size=40))
def test_counting_policies_ask_for_no_evidence(policy: str, interval: int, passed: list[int]) -> None:
    """Published as soon as the interval is full, never before; what the other policy counts does not matter."""
    sync, loser = Sync(policy, interval), PublishDecision(False, "it loses", 1.0, 2.0, 0)
    count = since = 0
    for more in passed:
        count, since = count + more, since + more
        steps, requests = (count, 10**6) if policy == "steps" else (10**6, count)
        assert bool(sync.reason(loser, steps, requests)) == (since >= interval)
        if since >= interval:
            sync.published(steps, requests)
            since = 0
