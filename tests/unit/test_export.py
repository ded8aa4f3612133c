"""``aurora-vllm export``: what comes out is the draft that went in; bad input is one line and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aurora_vllm import cli
from aurora_vllm.learner.checkpoints import Checkpoints
from aurora_vllm.learner.draft import load_draft, save_draft
from tests.unit.tiny_world import DRAFT, World

PROVENANCE = {
    "target": {"model": "owner/tiny", "architectures": ["LlamaForCausalLM"], "fingerprint": "f"},
    "config": {"num_speculative_tokens": 5},
}
STATE: tuple[dict[str, torch.Tensor], dict[str, Any]] = ({"optimizer.x": torch.zeros(2)}, {"steps": 1})


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A directory of checkpoints, the last one holding World().draft()."""
    made = Checkpoints(tmp_path / "kept", "run", PROVENANCE)
    made.save(World(1).draft(), DRAFT, *STATE)
    made.save(World().draft(), DRAFT, *STATE)
    return tmp_path / "kept"


@pytest.mark.parametrize("form", ["eagle3", "speculators"])
@pytest.mark.parametrize("place", ["", "latest", "checkpoint-000002"])
def test_a_checkpoint_comes_out_as_it_went_in(tmp_path: Path, kept: Path, form: str, place: str, capsys: Any) -> None:
    out = tmp_path / "deep" / "out"
    assert cli.main(["export", str(kept / place), str(out), "--format", form]) == 0
    assert capsys.readouterr().out == f"{kept / 'checkpoint-000002'} -> {out} ({form})\n"
    draft, again = World().draft(), load_draft(out)
    assert again.config == draft.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in draft.state_dict().items())
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}  # no training state
    assert out.stat().st_mode & 0o777 == 0o755
    prefixes = {name.split(".")[0] for name in load_file(out / "model.safetensors")}
    assert ("midlayer" in prefixes, "layers" in prefixes) == ((True, False) if form == "eagle3" else (False, True))


def test_the_speculators_format_says_what_it_is_for(tmp_path: Path, kept: Path) -> None:
    assert cli.main(["export", str(kept), str(tmp_path / "out"), "--format=speculators"]) == 0
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    own = described["speculators_config"]
    assert own["verifier"] == {"name_or_path": "owner/tiny", "architectures": ["LlamaForCausalLM"]}
    assert own["proposal_methods"][0]["speculative_tokens"] == 5
    arguments = ["export", str(kept), str(tmp_path / "other"), "--format=speculators", "--verifier", "me/mine"]
    assert cli.main(arguments) == 0
    described = json.loads((tmp_path / "other" / "config.json").read_text())
    assert described["speculators_config"]["verifier"]["name_or_path"] == "me/mine"


@pytest.mark.parametrize("options", [{}, {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"}], ids=str)
def test_vllm_takes_the_speculators_config(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its own reader: every key the layer asks for is there (it has no defaults for them)."""
    base = pytest.importorskip("vllm.transformers_utils.configs.speculators.base")
    save_draft(World().draft(**options), tmp_path / "draft", DRAFT | options)
    arguments = ["export", str(tmp_path / "draft"), str(tmp_path / "out"), "--format=speculators", "--verifier=o/t"]
    assert cli.main(arguments) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert base.SpeculatorsConfig.extract_vllm_speculative_config(config) == {
        "method": "eagle3",
        "num_speculative_tokens": 3,
    }
    read = base.SpeculatorsConfig.from_pretrained(tmp_path / "out")
    assert read.architectures == ["Eagle3Qwen3ForCausalLM" if options else "Eagle3LlamaForCausalLM"]
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(read, key) == DRAFT[key]
    assert (read.head_dim, read.draft_vocab_size, read.num_hidden_layers) == (16, 30, 1)
    assert read.rope_parameters["rope_theta"] == 100.0
    assert read.eagle_aux_hidden_state_layer_ids == [2, 4, 5]


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, kept: Path, capsys: Any) -> None:
    draft, scaled, full = tmp_path / "draft", tmp_path / "scaled", tmp_path / "full"
    save_draft(World().draft(), draft, DRAFT)
    save_draft(World().draft(logit_scale=0.5), scaled, DRAFT | {"logit_scale": 0.5})
    full.mkdir()
    (full / "mine").write_text("")
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "out")
    for arguments, line in [
        ([str(tmp_path / "nowhere"), out], "is no directory; give a checkpoint"),
        ([str(full), out], "is no checkpoint"),
        ([str(kept), str(full)], "exists already; name a directory that does not"),
        ([str(kept), str(tmp_path / "file")], "exists already"),
        ([str(kept), str(tmp_path / "file" / "out")], "cannot write"),
        ([str(draft), out, "--format=speculators"], "does not say which target it is for; name it with --verifier"),
        ([str(scaled), out, "--format=speculators", "--verifier=x"], "has no logit_scale"),
        ([str(kept), out, "--format=gguf"], "Invalid value for '--format'"),
        ([str(kept)], "Missing argument 'out'"),
    ]:
        assert cli.main(["export", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert line in captured.err and captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("aurora_vllm: error: ") and not captured.out
    assert not Path(out).exists()
    assert [path.name for path in full.iterdir()] == ["mine"]
    assert not list(tmp_path.glob(".*"))


def test_an_empty_directory_may_be_named(tmp_path: Path, kept: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cli.main(["export", str(kept), str(tmp_path / "out")]) == 0
    assert load_draft(tmp_path / "out").config == World().draft().config


def test_serve_is_the_entrypoint(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    monkeypatch.setattr(cli.entrypoint, "main", main)
    words = ["M", "--port=3", "-tp", "2", "--help", "--aurora-seed", "3"]
    assert cli.main(["serve", *words]) == 7
    assert seen == [words]
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert "export" in capsys.readouterr().out
