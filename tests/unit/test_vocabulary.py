"""The day-0 guess of the draft vocabulary, the count of what it covers, and the choice that follows the traffic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.learner.vocabulary import Coverage, Reselection, day0_order, day0_vocabulary, select, vocabulary_maps


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


def test_the_whole_order_holds_every_token_once(tmp_path: Path) -> None:
    tokenizer(
        tmp_path, {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 4}, "merges": ["a b"]}, [7, 6, 99], eos=[7, 10, 200]
    )
    order = day0_order(tmp_path, 10, 4)
    assert order.tolist()[:4] == [7, 0, 1, 4]
    assert sorted(order.tolist()) == list(range(10))


def test_coverage_is_of_the_recent_past() -> None:
    coverage = Coverage(5, memory=100.0)
    ids = torch.tensor([1, 3])
    assert coverage.share(ids) == 0.0
    coverage.observe(torch.tensor([1, 1, 3, 4]))
    assert coverage.share(ids) == 0.75
    assert coverage.share(torch.tensor([4])) == 0.25
    for _ in range(30):
        coverage.observe(torch.full((10,), 2))
    assert coverage.share(ids) < 0.01 and coverage.observed == 304
    assert float(coverage.counts.sum()) == pytest.approx(100, rel=0.1)  # of 304: the rest is forgotten


V = 40


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """counts, current vocabulary, day-0 rank, ending tokens."""
    counts = torch.zeros(V, dtype=torch.float64)
    for token, count in draw(st.dictionaries(st.integers(0, V - 1), st.floats(0.01, 50), max_size=30)).items():
        counts[token] = count
    size = draw(st.integers(4, 20))
    current = torch.tensor(sorted(draw(st.permutations(range(V)))[:size]))
    rank = torch.tensor(draw(st.permutations(range(V))))
    return counts, current, rank, torch.tensor(draw(st.lists(st.integers(0, V + 3), max_size=3)), dtype=torch.int64)


@given(choices())
def test_a_choice_keeps_size_order_and_endings_and_prefers_what_was_seen(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    counts, current, rank, ending = case
    chosen = select(counts, current, rank, ending)
    assert chosen.dtype == torch.int64 and len(chosen) == len(current)
    assert bool((chosen.diff() > 0).all()) and int(chosen[0]) >= 0 and int(chosen[-1]) < V
    ends = {token for token in ending.tolist() if token < V}
    inside, before = set(chosen.tolist()), set(current.tolist())
    assert ends <= inside
    outside = set(range(V)) - inside
    seen = {token for token in range(V) if counts[token] > 0}
    assert inside <= ends | seen | before  # nothing enters that nobody asked for
    worth = {token: (float(counts[token]), -int(rank[token])) for token in range(V)}
    for left_out in outside & (seen | before):
        assert all(worth[left_out] < worth[kept] for kept in inside - ends)


def traffic(target: Path, ids: torch.Tensor) -> tuple[Coverage, Reselection]:
    (target / "generation_config.json").write_text('{"eos_token_id": 3}')
    coverage = Coverage(V)
    coverage.observe(ids)
    return coverage, Reselection(target, threshold=0.97, enough=100)


def test_nothing_is_chosen_on_little_traffic_or_while_enough_is_covered(tmp_path: Path) -> None:
    current = torch.arange(8)
    coverage, reselection = traffic(tmp_path, torch.tensor([30] * 50))
    assert reselection.propose(coverage, current) is None  # nothing is covered, but 50 tokens are little
    coverage, reselection = traffic(tmp_path, torch.tensor([5] * 980 + [30] * 20))
    assert reselection.propose(coverage, current) is None  # 98 % covered
    assert Reselection(tmp_path, threshold=0.0).propose(traffic(tmp_path, torch.full((5000,), 30))[0], current) is None


def test_what_was_seen_comes_in_the_worst_ranked_goes_and_it_settles(tmp_path: Path) -> None:
    current = torch.arange(8)
    coverage, reselection = traffic(tmp_path, torch.tensor([1] * 900 + [30] * 60 + [20] * 40))
    chosen = reselection.propose(coverage, current)
    assert chosen is not None and chosen.tolist() == [0, 1, 2, 3, 4, 5, 20, 30]
    assert reselection.propose(coverage, current) is None  # not again so soon, whatever is covered
    coverage.observe(torch.tensor([1] * 900 + [31] * 60 + [21] * 40))
    assert reselection.propose(coverage, chosen) is not None


def test_tokens_seen_once_are_no_reason_to_choose_again(tmp_path: Path) -> None:
    rare = torch.arange(8, 16)  # 8 of 200, 4 %, each once
    coverage, reselection = traffic(tmp_path, torch.cat([torch.full((192,), 1), rare]))
    assert coverage.share(torch.arange(8)) < 0.97
    assert reselection.propose(coverage, torch.arange(8)) is None
    coverage.observe(torch.cat([torch.full((192,), 1), rare]))
    chosen = reselection.propose(coverage, torch.arange(8))
    assert chosen is not None and 3 in chosen and 1 in chosen  # the end token stays though it was never seen
