"""What vLLM's own flags say of speculation, taken as ours or refused."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError
from aurora_vllm.speculative_config import take_speculative_config


def speculate(
    given: dict[str, Any] | None, config: AuroraConfig | None = None, *explicit: str, **short: Any
) -> AuroraConfig:
    args = Namespace(speculative_config=given, **short)
    return take_speculative_config(args, config or AuroraConfig(), frozenset(explicit))


def test_an_eagle3_draft_of_vllms_is_ours() -> None:
    assert speculate(None) == AuroraConfig()
    taken = speculate({"method": "eagle3", "model": "/d", "num-speculative-tokens": 5})
    assert (taken.draft, taken.num_speculative_tokens) == (Path("/d"), 5)
    assert speculate({"model": "/d"}).num_speculative_tokens == 3
    same = AuroraConfig(draft=Path("/d"), num_speculative_tokens=5)
    assert speculate({"model": "/d", "num_speculative_tokens": 5}, same, "draft", "num_speculative_tokens") == same


def test_vllms_short_flags_say_the_same() -> None:
    short: dict[str, Any] = {"spec_method": "eagle3", "spec_model": "/d", "spec_tokens": 5}
    assert speculate(None, **short) == speculate({"method": "eagle3", "model": "/d", "num_speculative_tokens": 5})
    args = Namespace(
        speculative_config={"model": "/d", "draft_sample_method": "greedy"}, **short | {"spec_model": None}
    )
    assert take_speculative_config(args, AuroraConfig(), frozenset()).num_speculative_tokens == 5
    assert not (args.spec_method or args.spec_tokens)  # vLLM would find them, and ours, mutually exclusive
    assert args.speculative_config["draft_sample_method"] == "greedy"
    with pytest.raises(AuroraError, match="--spec-tokens and --speculative-config both say num_speculative_tokens"):
        speculate({"model": "/d", "num-speculative-tokens": 4}, spec_tokens=5)
    with pytest.raises(AuroraError, match="Aurora trains EAGLE-3 drafts, and --spec-method says method 'ngram'"):
        speculate(None, spec_method="ngram")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "ngram"}, "--speculative-config says method 'ngram'"),
        ({"method": "eagle3"}, "--speculative-config says no model"),
        ({"model": "/d", "quantization": "fp8"}, "cannot update a quantised draft, and --speculative-config says"),
        ({"model": "/d", "parallel_drafting": True}, "says parallel_drafting True"),
        ({"model": "/d", "enable-adaptive-verification": True}, "says enable_adaptive_verification True"),
        (
            {"model": "/d", "num_speculative_tokens": 9},
            "num_speculative_tokens: Input should be less than or equal to 8",
        ),
        ({"model": "/other"}, "--speculative-config and --aurora-draft disagree (/other and /d)"),
    ],
)
def test_other_speculation_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(AuroraError) as caught:
        speculate(given, AuroraConfig(draft=Path("/d")), "draft")
    assert said in str(caught.value)
