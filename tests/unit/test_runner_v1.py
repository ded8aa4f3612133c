"""The V1 adapter on a runner of straw; on vLLM's own it is tested in tests/integration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_vllm.spec_decode.runner_v1 import V1Adapter

DRAFTED = torch.full((2, 3), 7)


class StrawRunner:
    """Two requests."""

    def __init__(self, overlapping: bool) -> None:
        self.use_async_scheduling = overlapping
        self.input_batch = SimpleNamespace(req_ids=["a", "b"])
        self.device = torch.device("cpu")

    def sample_tokens(self) -> None: ...

    def _sample(self) -> None: ...

    def propose_draft_token_ids(self, scheduler_output: Any) -> torch.Tensor:
        return DRAFTED


def proposed(length: int, prompt_tokens: int = 0, sits_out: bool = False, overlapping: bool = False) -> torch.Tensor:
    runner = StrawRunner(overlapping)
    V1Adapter(runner, on_step=lambda build: None, on_propose=lambda: 1, sits_out=lambda: sits_out)
    step = SimpleNamespace(
        num_spec_tokens_to_schedule=length,
        scheduled_spec_decode_tokens={"a": [1, 2]},
        num_scheduled_tokens={"a": 3, "b": 1 + prompt_tokens},
    )
    return runner.propose_draft_token_ids(step)


@pytest.mark.parametrize(
    ("how", "runs"),
    [
        ({"length": 3}, True),
        ({"length": 0}, False),
        ({"length": 0, "prompt_tokens": 5}, True),  # its KV cache is kept for who drafts from it later
        ({"length": 0, "prompt_tokens": 5, "sits_out": True}, False),
        # vLLM asserts that whoever verified drafts has proposed, where the next step begins before this one is known
        ({"length": 0, "overlapping": True}, True),
    ],
)
def test_when_the_draft_runs(how: dict[str, Any], runs: bool) -> None:
    tokens = proposed(**how)
    assert tokens is DRAFTED if runs else tokens.shape == (2, 0)
