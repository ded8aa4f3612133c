from __future__ import annotations

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
