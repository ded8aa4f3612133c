"""The arithmetic of the post-swap benchmark, on answers whose acceptance is known."""

from __future__ import annotations

import pytest

from benchmarks.swap_dip import AGES, BEFORE, Answer, Runs, summary


def answer(gains: list[int]) -> Answer:
    lengths = [1]
    for gain in gains:
        lengths.append(lengths[-1] + gain)
    return Answer(lengths)


def test_a_verification_counts_by_where_it_begins() -> None:
    one = answer([2, 1, 3, 4])  # begins at 1, 3, 4, 7
    assert one.verifications(1, 0, 3) == [2, 1]
    assert one.verifications(1, 3, 7) == [3, 4]
    assert one.verifications(4, 0, 100) == [3, 4]


def test_what_is_lost_after_the_swap_is_found() -> None:
    """Two tokens a step on the new weights, only one for 16 tokens after a swap that keeps KV, and nothing lost by one
    that drops it; behind the cached prompt as well."""
    total = BEFORE + AGES[-1] + 16
    whole = answer([2] * (total // 2))
    swapped = answer([1] * (BEFORE + 16) + [2] * 24)
    cached = answer([2] * 10)
    late = answer([1] * (BEFORE + 1) + [1, 2, 2, 2, 2, 2, 2, 2] + [2] * 24)
    first = {"swapped": 1 + BEFORE, "dropped": 1 + BEFORE, "late": 2 + BEFORE}
    runs = Runs(whole, swapped, answer([1] * 20), whole, cached, late, first)
    figures, spread, curves = summary([runs] * 4, seed=0)
    assert figures["post_swap_dip"] == figures["prefix_cache_dip"] == pytest.approx(0.5)
    assert figures["post_swap_dip_kv_dropped"] == figures["prefix_cache_dip_kv_dropped"] == pytest.approx(1.0)
    assert figures["catch_up_dip"] == pytest.approx(17 / 9 / 2)  # one verification of nine gained one token less
    assert curves["swapped while running, KV kept"] == [1.0, 2.0, 2.0, 2.0]
    assert curves["wholly on the new weights"] == [2.0] * 4
    assert figures["requests"] == 4 and len(spread["post_swap_dip"]) == 4
