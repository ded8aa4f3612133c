from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.spec_decode.sampling_fix import expand_batch_to_tokens, loses_its_output


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 4)), min_size=1, max_size=8))
def test_expands_each_request_over_its_tokens(requests: list[tuple[float, int]]) -> None:
    values = torch.tensor([value for value, _ in requests])
    cumulative = torch.tensor([count for _, count in requests], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    got = expand_batch_to_tokens(values, cumulative, int(cumulative[-1]), replace_from=0, replace_to=1)
    expected = [value or 1.0 for value, count in requests for _ in range(count)]
    assert torch.allclose(got, torch.tensor(expected))


def test_probe_tells_a_working_function_from_one_that_loses_its_output() -> None:
    assert not loses_its_output(expand_batch_to_tokens)
    assert loses_its_output(lambda x, cu, n, replace_from, replace_to: torch.full((n,), 0.25))
