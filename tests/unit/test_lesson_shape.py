"""Which rows a lesson is over, and what shape a draft needs for one."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.learner import lesson_rows
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.lesson_shape import heads_for, unknowns
from aurora_vllm.learner.trajectory import Trajectory


def of_lengths(lengths: list[int]) -> list[Trajectory]:
    return [
        Trajectory(i, 0, torch.zeros(n, dtype=torch.int64), torch.zeros(n, 0), torch.zeros(n, 0), 0, 1, 0.0)
        for i, n in enumerate(lengths)
    ]


@given(st.lists(st.integers(4, 300), min_size=1, max_size=20))
def test_the_newest_rows_are_held_out(lengths: list[int]) -> None:
    trajectories = of_lengths(lengths)
    learned, held_out = lesson_rows.hold_out(trajectories)
    assert [*learned, *held_out] == trajectories and learned
    rows = [len(one.token_ids) for one in held_out]
    assert len(learned) == 1 or sum(rows) >= lesson_rows.HELD_OUT * sum(lengths) > sum(rows[1:])


@given(st.lists(st.integers(1, 3 * lesson_rows.PIECE_ROWS // 2), min_size=1, max_size=12))
def test_pieces_hold_everything_once_in_order(lengths: list[int]) -> None:
    trajectories = of_lengths(lengths)
    pieces = lesson_rows.pieces_of(trajectories)
    assert [one.request for piece in pieces for one in piece] == list(range(len(lengths)))
    for piece in pieces:
        assert len(piece) == 1 or sum(len(one.token_ids) for one in piece) <= lesson_rows.PIECE_ROWS


def test_heads_of_a_draft_that_is_to_have_lessons() -> None:
    assert heads_for(576, 9, 64, 3, 3) == 12  # SmolLM2-135M: nine hold a value per channel, three are for induction
    assert heads_for(1024, 16, 128, 8, 3) == 16
    assert heads_for(2048, 16, 128, 8, 3) == 32  # 24 do not divide the hidden size
    assert heads_for(192, 3, 64, 1, 3) == 4
    assert heads_for(192, 3, 64, 3, 3) == 6
    assert heads_for(320, 5, 64, 1, 3) == 8
    assert heads_for(100, 3, 64, 3, 3) == 3  # no multiple of the target's key-value heads divides: no induction
    assert heads_for(2304, 36, 64, 4, 3) == 36  # induction's normal equations would have 13,824 unknowns
    assert heads_for(4096, 32, 128, 8, 3) is None  # those without it 20,480
    assert heads_for(100, 1, 64, 3, 3) is None  # attention is narrower than the residual stream


def test_unknowns_follow_the_heads_a_draft_has() -> None:
    assert unknowns(576, 12, 64, 3) == 6 * 576
    assert unknowns(576, 9, 64, 3) == 5 * 576  # of a draft made before there were induction heads
    assert unknowns(576, 3, 64, 3) == 0
    assert unknowns(2304, 40, 64, 3) == 5 * 2304  # too many with induction
    assert unknowns(4096, 40, 128, 3) == 0


def test_a_served_models_shape(tmp_path: Path) -> None:
    """On SmolLM2's real config the day-0 draft is one that the lesson is due for."""
    from aurora_vllm.learner.day0 import draft_config

    config = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 30, "rms_norm_eps": 1e-5, "vocab_size": 49152, "max_position_embeddings": 8192,
    }  # fmt: skip
    with torch.device("meta"):
        draft = Eagle3Draft(Eagle3Config.from_hf(draft_config(config)))
    assert (
        draft.config.num_key_value_heads == draft.config.num_attention_heads == 12
        and draft.config.draft_vocab_size == 4608
    )
