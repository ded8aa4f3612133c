"""Aurora's own numbers: two recorded cases where they are at hand, cases of other sizes from the naive objective."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.naive_eagle3 import Sizes, naive_loss, random_case
from tools.parity import compare, load_case, main

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "aurora_loss"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no recorded cases beside the project")
@pytest.mark.parametrize("name", ["full_vocab", "pruned_vocab"])
def test_equals_the_release(name: str) -> None:
    result = compare(load_case(GOLDEN / f"{name}.json"))
    assert result["within_tolerance"], result
    assert len(result["gradient_relative_difference"]) == 13
    assert max(step["loss_difference"] for step in result["steps"]) < 1e-4


def write_case(directory: Path, sizes: Sizes, **options: Any) -> Path:
    """A case in the recorded ones' format, made by the naive objective."""
    draft, head, batch = random_case(sizes, seed=4, **options)
    total, losses, accuracies = naive_loss(draft, head, batch, sizes.ttt, "aurora-release")
    total.backward()
    tensors = {
        "in.input_ids": batch.input_ids,
        "in.aux_hidden_states": batch.aux,
        "in.last_hidden_states": batch.last,
        "in.attention_mask": batch.attention_mask.long(),
        "in.loss_mask": batch.loss_mask.long(),
        "target.lm_head": head.lm_head,
        "draft.embed_tokens.weight": head.embed_tokens,
    }
    tensors |= {f"draft.{name}": tensor for name, tensor in draft.state_dict().items()}
    tensors |= {f"grad.{name}": p.grad for name, p in draft.named_parameters() if p.grad is not None}
    path = directory / "case.json"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".safetensors"))
    results = {"step_loss": losses, "step_accuracy": accuracies, "total_loss": float(total.detach())}
    path.write_text(json.dumps({**sizes.config(**options), "ttt_length": sizes.ttt, **results}))
    return path


CASE = Sizes([11, 4, 7], [2, 1, 6], kv_heads=2, group=3, head_dim=10, hidden=12, ttt=4)


@pytest.mark.parametrize("sizes", [CASE, Sizes([5], [2], draft_vocab=19, ttt=1)], ids=["ragged", "one"])
def test_other_sizes(tmp_path: Path, sizes: Sizes, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_case(tmp_path, sizes))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["steps"]) == sizes.ttt and result["total_loss_difference"] < 1e-4


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    sizes, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    change(sizes, tensors)
    path.write_text(json.dumps(sizes))
    save_file(tensors, path.with_suffix(".safetensors"))


@pytest.mark.parametrize(
    "change",
    [
        lambda sizes, _: sizes["step_loss"].__setitem__(1, sizes["step_loss"][1] + 3e-4),
        lambda sizes, _: sizes.__setitem__("total_loss", sizes["total_loss"] + 1e-3),
        lambda _, tensors: tensors["grad.fc.weight"].mul_(1.01),
        lambda _, tensors: tensors["in.last_hidden_states"].mul_(1.01),
    ],
    ids=["step loss", "total", "gradient", "input"],
)
def test_a_difference_is_found(tmp_path: Path, change: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_case(tmp_path, CASE)
    edit(path, change)
    assert main([str(path)]) == 1
    assert json.loads(capsys.readouterr().out)["within_tolerance"] is False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda sizes, _: sizes.pop("ttt_length"), "ttt_length"),
        (lambda sizes, _: sizes.pop("hidden_size"), "hidden_size"),
        (lambda sizes, _: sizes.__setitem__("ttt_length", 9), "step_loss"),
        (lambda _, tensors: tensors.pop("in.loss_mask"), "in.loss_mask"),
        (lambda _, tensors: tensors.pop("grad.norm.weight"), "grad.norm.weight"),
        (lambda _, tensors: tensors.pop("draft.embed_tokens.weight"), "embed_tokens"),
        (lambda _, tensors: tensors.update({"in.loss_mask": torch.ones(2, 2)}), "in.loss_mask"),
        (lambda _, tensors: tensors.update({"in.input_ids": torch.full((3, 11), 500)}), "token ids"),
        (lambda _, tensors: tensors.update({"draft.fc.weight": torch.ones(2, 2)}), "fc.weight"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, change: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_case(tmp_path, CASE)
    edit(path, change)
    assert_refused(path, says, capsys)


def test_files_that_are_no_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(tmp_path / "nowhere.json", "nowhere.json", capsys)
    path = write_case(tmp_path, CASE)
    path.with_suffix(".safetensors").write_bytes(b"not tensors at all")
    assert_refused(path, "cannot read", capsys)
    path.write_text("[1, 2")
    assert_refused(path, "cannot read", capsys)


def assert_refused(path: Path, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
