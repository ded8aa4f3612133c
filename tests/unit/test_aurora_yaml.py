"""Aurora's own YAML: every key of the table is honoured as it says, or reported with the reason it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aurora_vllm import entrypoint
from aurora_vllm import settings as front
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import SettingsError
from aurora_vllm.interop.aurora_yaml import Entry
from aurora_vllm.interop.keys import KEYS, Key
from aurora_vllm.learner.loss import Semantics
from tools.compatibility_table import DOCUMENT, document, here

# Key -> the setting, a value of Aurora's, and what the setting is then. Every row of the table that has one is here.
SETTINGS: dict[str, tuple[str, Any, Any]] = {
    "training.load_path": ("resume", "/kept/000001", Path("/kept/000001")),
    "decode.weight_sync_enabled": ("sync", True, "steps"),
    "decode.weight_sync_interval": ("sync_interval", 7, 7),
    "output_dir": ("checkpoint_dir", "/kept", Path("/kept")),
    "model.draft_pretrained_path": ("draft", "owner/draft", Path("owner/draft")),
    "decode.speculative_draft_model_path": ("draft", "/some/draft", Path("/some/draft")),
    "training.learning_rate": ("learning_rate", "1e-5", 1e-5),  # YAML 1.1 reads 1e-5 as text
    "training.ttt_length": ("ttt_length", 5, 5),
    "training.max_seq_length": ("max_trajectory_tokens", 1024, 1024),
    "training.num_epochs": ("replay_passes", 1, 1.0),
    "training.seed": ("seed", 42, 42),
    "decode.speculative_num_steps": ("num_speculative_tokens", 5, 5),
    "online_serving.enabled": ("sglang_api", True, True),
    "debug.debug_inference_only": ("learn", True, False),
}
FLAGS: dict[str, tuple[Any, list[str]]] = {
    "model.trust_remote_code": (True, ["--trust-remote-code"]),
    "decode.max_running_requests": (12, ["--max-num-seqs", "12"]),
    "decode.cuda_graph_max_bs": (8, ["--max-cudagraph-capture-size", "8"]),
    "model_download_dir": ("/models", ["--download-dir", "/models"]),
}
# Key -> a value that says what is done here anyway, and one that does not.
HELD: dict[str, tuple[Any, Any]] = {
    "model.embedding_key": ("model.language_model.embed_tokens.weight", "wte.weight"),
    "model.lm_head_key": ("language_model.lm_head.weight", "head"),
    "training.train_with_decode": (True, False),
    "training.colocate": (True, False),
    "training.lr_decay_style": ("constant", "cosine"),
    "training.max_grad_norm": (1.0, 2.5),
    "training.gradient_checkpointing": (False, True),
    "training.training_num_gpus_per_node": (1, 2),
    "training.training_num_nodes": (1, 2),
    "inference.sglang.tp_size": (1, 4),
    "inference.sglang.pp_size": (1, 2),
    "inference.sglang.nnodes": (1, 2),
    "decode.speculative_algorithm": ("EAGLE3", "NEXTN"),
    "decode.speculative_eagle_topk": (1, 4),
}


def write(directory: Path, values: dict[str, Any]) -> Path:
    """A YAML file from dotted keys. It has a section even where all keys are at the top."""
    tree: dict[str, Any] = {"model": None}
    for name, value in values.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node[part] = node.get(part) or {}
            node = node[part]
        node[last] = value
    file = directory / "aurora.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def read(directory: Path, values: dict[str, Any], *argv: str, **environment: str) -> front.Invocation:
    return front.parse([*argv, "--aurora-config", str(write(directory, values))], environment)


def only_entry(found: front.Invocation) -> Entry:
    assert found.aurora_file is not None
    (entry,) = found.aurora_file.entries
    return entry


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_each_key_does_what_its_row_says(key: Key, tmp_path: Path) -> None:
    assert f"| `{key.name}` | " in DOCUMENT.read_text()
    if key.setting:
        setting, value, wanted = SETTINGS[key.name]
        found = read(tmp_path, {key.name: value})
        assert key.setting == setting
        assert getattr(found.config, key.setting) == wanted != getattr(AuroraConfig(), key.setting)
        assert found.explicit == {key.setting}
        assert only_entry(found).honoured
        assert only_entry(found).what.startswith(f"{key.setting} = ")
    elif key.flag == "MODEL":
        found = read(tmp_path, {key.name: "owner/model"}, "--port", "3")
        assert found.aurora_file is not None
        assert (found.aurora_file.model, found.vllm_argv) == ("owner/model", ["--port", "3"])
        assert only_entry(found).honoured
    elif key.flag:
        value, flags = FLAGS[key.name]
        assert read(tmp_path, {key.name: value}, "M", "--port", "3").vllm_argv == ["M", *flags, "--port", "3"]
        assert only_entry(read(tmp_path, {key.name: value})).honoured
    elif key.holds is not None:
        same, other = (read(tmp_path, {key.name: value}) for value in HELD[key.name])
        assert (only_entry(same).honoured, only_entry(same).what) == (True, key.note)
        assert (only_entry(other).honoured, only_entry(other).what) == (False, key.otherwise or key.note)
        assert same.config == other.config == AuroraConfig()
    else:
        name = key.name.replace("*", "something")
        found = read(tmp_path, {name: key.default or "x"})
        assert only_entry(found) == Entry(name, False, key.note)
        assert key.note and key.note in here(key)
        assert found.config == AuroraConfig()
    assert read(tmp_path, {key.name.replace("*", "something"): None}).config == AuroraConfig()  # null says nothing


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document(), "run python -m tools.compatibility_table"


def test_each_row_is_one_of_a_kind() -> None:
    assert len({key.name for key in KEYS}) == len(KEYS)
    for key in KEYS:
        assert bool(key.setting) + bool(key.flag) + (key.holds is not None) <= 1
        assert not key.setting or key.setting in AuroraConfig.model_fields
        if not key.setting and not key.flag:
            assert key.note


def test_a_file_as_aurora_ships_it(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {
            "model.target_model_path": "Qwen/Qwen3-8B",
            "training.learning_rate": "1e-5",
            "training.train_with_decode": True,
            "training.training_num_gpus_per_node": 2,
            "decode.speculative_num_steps": 5,
            "decode.weight_sync_enabled": True,
            "decode.weight_sync_interval": 50,
            "online_serving.sglang_url": None,
            "mooncake.global_segment_size": "16GB",
            "inference.sglang.extra_args.quantization": "fp8",
            "output_dir": "./outputs",
            "cache_dir": "./cache",
        },
    )
    assert found.config == AuroraConfig(
        learning_rate=1e-5, num_speculative_tokens=5, sync="steps", sync_interval=50, checkpoint_dir=Path("./outputs")
    )
    assert found.aurora_file is not None
    honoured, others = found.aurora_file.summary()
    assert honoured.endswith(
        "honoured: model.target_model_path, training.learning_rate (learning_rate = 1e-5), "
        "training.train_with_decode, decode.speculative_num_steps (num_speculative_tokens = 5), "
        "decode.weight_sync_enabled (sync = steps), decode.weight_sync_interval (sync_interval = 50), "
        "output_dir (checkpoint_dir = ./outputs)"
    )
    assert others.endswith(
        ": training.training_num_gpus_per_node, mooncake.global_segment_size, "
        "inference.sglang.extra_args.quantization, cache_dir"
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(by_flag=st.booleans(), by_variable=st.booleans())
def test_flags_override_environment_overrides_aurora_file(tmp_path: Path, by_flag: bool, by_variable: bool) -> None:
    argv = ["--aurora-learning-rate", "0.3"] if by_flag else []
    environment = {"AURORA_LEARNING_RATE": "0.2"} if by_variable else {}
    found = read(tmp_path, {"training.learning_rate": 0.1}, *argv, **environment)
    assert found.config.learning_rate == (0.3 if by_flag else 0.2 if by_variable else 0.1)
    by = " overridden by --aurora-learning-rate" if by_flag else " overridden by AURORA_LEARNING_RATE"
    assert only_entry(found).what == "learning_rate = 0.1" + ("," + by if by_flag or by_variable else "")


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    found = read(tmp_path, {"logging.wandb_key": "s3cret"})
    assert found.aurora_file is not None
    assert "s3cret" not in str(found.aurora_file.as_dict()) + str(found.aurora_file.summary())


def test_options_of_the_command_line_come_last_and_win(tmp_path: Path) -> None:
    found = read(tmp_path, {"decode.max_running_requests": 12}, "serve", "M", "--max-num-seqs", "4")
    assert found.vllm_argv == ["M", "--max-num-seqs", "12", "--max-num-seqs", "4"]
    assert read(tmp_path, {"decode.max_running_requests": 12}, "--port=3").vllm_argv[-1] == "--port=3"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"training.learning_rat": 1},
            "unknown key training.learning_rat in {file}; the nearest is training.learning_rate",
        ),
        ({"decod.temperature": 1}, "unknown key decod.temperature in {file}; the nearest is decode.temperature"),
        ({"ring_mb": 3}, "unknown key ring_mb in {file}, which is Aurora's; --aurora-ring-mb sets ours"),
        ({"training": 5}, "training in {file}: input should be a mapping of keys to values, not 5"),
        ({"training.ttt_length": 9}, "training.ttt_length in {file}: input should be less than or equal to 8, not 9"),
        ({"training.seed": "${oc.env:SEED}"}, "training.seed in {file}: references are not read, write the value out"),
        ({"training.seed": [1]}, "training.seed in {file}: input should be one value, not [1]"),
        (
            {"debug.debug_inference_only": "no way"},
            "debug.debug_inference_only in {file}: input should be true or false",
        ),
        ({"model.trust_remote_code": "y"}, "model.trust_remote_code in {file}: input should be true or false, not 'y'"),
        (
            {"model.draft_pretrained_path": "a", "decode.speculative_draft_model_path": "b"},
            "model.draft_pretrained_path in {file} and decode.speculative_draft_model_path disagree ('a' and 'b')",
        ),
    ],
)
def test_wrong_files_are_one_clear_line_and_exit_code_2(values: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, values)
    assert str(caught.value).startswith(line.format(file=tmp_path / "aurora.yaml"))


def test_two_keys_that_say_the_same_agree(tmp_path: Path) -> None:
    names = ("model.draft_pretrained_path", "decode.speculative_draft_model_path")
    found = read(tmp_path, dict.fromkeys(names, "/d"))
    assert found.config.draft == Path("/d")
    assert found.aurora_file is not None
    assert all(entry.what == "draft = /d" for entry in found.aurora_file.entries)


def test_a_bad_file_ends_with_code_2(tmp_path: Path, capfd: Any) -> None:
    assert entrypoint.main(["--aurora-config", str(write(tmp_path, {"training.x": 1, "decode.y": 2}))]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_our_semantics_are_those_of_the_loss() -> None:
    assert get_args(AuroraConfig.model_fields["semantics"].annotation) == get_args(Semantics)
