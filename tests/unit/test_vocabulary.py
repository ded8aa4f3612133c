"""The day-0 guess of the draft vocabulary, and the count of what it covers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aurora_vllm.learner.vocabulary import Coverage, day0_vocabulary, vocabulary_maps


def tokenizer(directory: Path, model: dict[str, object], added: list[int], eos: int | list[int]) -> None:
    entry = {"model": model, "added_tokens": [{"id": i, "content": f"<{i}>"} for i in added]}
    (directory / "tokenizer.json").write_text(json.dumps(entry))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": eos}))


def test_byte_pair_merges_come_in_order(tmp_path: Path) -> None:
    # Ids deliberately not in merge order, and a rare character (SentencePiece lists thousands) that must come last.
    vocab = {"a": 0, "b": 1, "\u4e2d": 2, "abb": 3, "ab": 4, "ba": 5}
    tokenizer(tmp_path, {"type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "b"], "b a"]}, [7, 6], eos=[7])
    assert day0_vocabulary(tmp_path, 10, 4).tolist() == [0, 1, 4, 7]  # end, two letters, first merge
    assert day0_vocabulary(tmp_path, 10, 5).tolist() == [0, 1, 3, 4, 7]
    assert day0_vocabulary(tmp_path, 10, 7).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert day0_vocabulary(tmp_path, 10, 10).tolist() == list(range(10))


def test_unigram_goes_by_score(tmp_path: Path) -> None:
    vocab = [["x", -5.0], ["y", -1.0], ["z", -3.0], ["w", -2.0]]
    tokenizer(tmp_path, {"type": "Unigram", "vocab": vocab}, [], eos=0)
    assert day0_vocabulary(tmp_path, 4, 3).tolist() == [0, 1, 3]


def test_without_a_tokenizer_low_ids(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 90}')
    assert day0_vocabulary(tmp_path, 100, 4).tolist() == [0, 1, 2, 90]


@pytest.mark.parametrize("size", [0, 11])
def test_impossible_sizes_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        day0_vocabulary(tmp_path, 10, size)


def test_maps_are_inverse() -> None:
    ids = torch.tensor([1, 4, 5, 9])
    d2t, t2d = vocabulary_maps(ids, 12)
    assert torch.equal(torch.arange(4) + d2t, ids)
    assert t2d.nonzero().flatten().tolist() == ids.tolist()


def test_coverage_counts() -> None:
    coverage = Coverage(torch.tensor([1, 3]), 5)
    assert coverage.share() == 0.0
    coverage.observe(torch.tensor([1, 1, 4]))
    coverage.observe(torch.tensor([3]))
    assert coverage.share() == 0.75
    assert coverage.counts.tolist() == [0, 2, 0, 1, 1]
