from __future__ import annotations

import logging

import pytest

from aurora_vllm.spec_decode.breaker import CircuitBreaker


def test_opens_after_consecutive_failures_only() -> None:
    messages: list[str] = []
    breaker = CircuitBreaker("work", limit=3, on_failure=messages.append)
    ran: list[int] = []

    def fail() -> None:
        ran.append(1)
        raise RuntimeError("boom")

    assert breaker.run(lambda: None)
    for _ in range(2):
        assert not breaker.run(fail)
    assert breaker.run(lambda: None)  # a success closes the count
    for _ in range(3):
        breaker.run(fail)
    assert breaker.open
    assert not breaker.run(fail)
    assert len(ran) == 5
    assert messages[0] == "RuntimeError: boom"


def test_failures_between_successes_are_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    breaker = CircuitBreaker("work", limit=3)
    for _ in range(5):
        breaker.run(lambda: 1 / 0)
        breaker.run(lambda: None)
    assert not breaker.open
    assert [record.getMessage() for record in caplog.records] == ["aurora: work failed; it is tried again"]


def test_one_failure_may_be_enough_and_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    breaker = CircuitBreaker("work", limit=1)
    for _ in range(2):
        assert not breaker.run(lambda: 1 / 0)
    assert [record.getMessage() for record in caplog.records] == ["aurora: work failed and is off until restart"]
