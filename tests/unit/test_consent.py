"""Who is learned from: who says nothing or says yes, and asks for more than one token."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from aurora_vllm.spec_decode.consent import may_learn


def params(wish: Any, max_tokens: int | None = 16) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, extra_args={"aurora_learn": wish})


@pytest.mark.parametrize("wish", [True, 1, 1.0, "1", "true", "TRUE", " yes ", "on"])
def test_consent(wish: Any) -> None:
    assert may_learn(params(wish))
    assert may_learn(params(wish, max_tokens=None))


@pytest.mark.parametrize(
    "wish", [False, 0, 0.0, "0", "false", "FALSE ", "no", "off", "n", "f", "none", "", None, [], [0], "maybe"]
)
def test_what_is_no_consent_is_an_opt_out(wish: Any) -> None:
    assert not may_learn(params(wish))


def test_who_says_nothing_may_be_learned_from_but_for_single_tokens() -> None:
    """Those are all that a beam search or a scoring is made of, and a client's wish does not come along."""
    assert may_learn(SamplingParams()) and may_learn(SamplingParams(max_tokens=2)) and may_learn(None)
    assert not may_learn(SamplingParams(max_tokens=1))
