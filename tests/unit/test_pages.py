"""Memory of trajectories returns to the system."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.learner.pages import LEAST_BYTES, copy_to_own_pages


def is_mapped(address: int) -> bool:
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


@given(st.integers(0, 300), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_a_copy_equals_its_source_and_shares_nothing_with_it(rows: int, dtype: torch.dtype) -> None:
    source = torch.arange(rows * 256).reshape(rows, 256).to(dtype)[:, 3:131]  # columns, as those of a ring's rows
    copy = copy_to_own_pages(source)
    assert copy.dtype == dtype and copy.is_contiguous() and torch.equal(copy, source)
    if rows:
        source[0] += 1
        assert not torch.equal(copy, source)


def test_freed_memory_is_no_longer_mapped() -> None:
    copy = copy_to_own_pages(torch.ones(LEAST_BYTES))  # four times as many bytes
    part, address = copy[5:], copy.data_ptr()
    del copy
    assert is_mapped(address) and part.sum() == LEAST_BYTES - 5  # a view keeps it
    del part
    assert not is_mapped(address)


def test_where_nothing_can_be_mapped_it_is_an_ordinary_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert torch.equal(copy_to_own_pages(torch.ones(LEAST_BYTES)), torch.ones(LEAST_BYTES))
