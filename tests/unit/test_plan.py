"""What a run will be: sizes, the draft and whether it fits the target, and how it is shown."""

from __future__ import annotations

import json
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from aurora_vllm import checkpoint, models, plan, plan_view, preflight
from aurora_vllm.checkpoint import Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.config_json import read_config
from aurora_vllm.errors import AuroraError
from aurora_vllm.interop import aurora_yaml
from aurora_vllm.learner import day0
from aurora_vllm.learner.draft import Eagle3Config, Eagle3Draft, bank_specs, load_draft, save_draft
from aurora_vllm.spec_decode.compat import Probe
from aurora_vllm.spec_decode.model_runner import ModelRunner
from aurora_vllm.spec_decode.scheduler import _lengths
from aurora_vllm.transport.bank import bank_bytes
from aurora_vllm.transport.ring import ring_bytes

HIDDEN, VOCABULARY, LAYERS = 16, 100, 8
DRAFT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "draft_vocab_size": 64,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "num_hidden_layers": 1,
}
TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
}


V1, V2 = ModelRunner("V1", "no Triton for this device"), ModelRunner("V2", "vLLM's default")


@pytest.fixture
def target(tmp_path: Path) -> Target:
    directory = tmp_path / "target"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TARGET))
    save_file({"model.embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN)}, directory / "model.safetensors")
    return Target("owner/target", directory, HIDDEN, LAYERS, VOCABULARY, "float32")


@pytest.fixture
def draft_dir(tmp_path: Path) -> Path:
    save_draft(Eagle3Draft(Eagle3Config.from_hf(DRAFT)), tmp_path / "draft", DRAFT)
    return tmp_path / "draft"


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_draft_that_fits(target: Target, draft_dir: Path) -> None:
    draft = checkpoint.read_draft(draft_dir, target)
    assert (draft.origin, draft.aux_layers, draft.vocab_size) == ("given", (2, 4, 5), 64)
    assert list(draft.specs) == bank_specs(load_draft(draft_dir))
    parameters = (p for p in load_draft(draft_dir).parameters())
    assert draft.num_parameters == sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hidden_size": 32}, "its hidden_size is 32, the target's is 16"),
        ({"target_hidden_size": 32}, "its target_hidden_size is 32, the target's is 16"),
        ({"vocab_size": 99}, "its vocab_size is 99, the target's is 100"),
        ({"intermediate_size": 48}, "tensor midlayer.mlp.gate_proj.weight is [24, 16], it should be [48, 16]"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4]}, "tensor fc.weight is [16, 48], it should be [16, 32]"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 5]}, "auxiliary layers [2, 2, 5] with 8 target layers"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, "auxiliary layers [2, 4, 9] with 8 target layers"),
    ],
)
def test_a_draft_that_does_not_fit(target: Target, draft_dir: Path, changes: dict[str, Any], line: str) -> None:
    change_config(draft_dir, **changes)
    with pytest.raises(AuroraError, match="does not fit owner/target: ") as caught:
        checkpoint.read_draft(draft_dir, target)
    assert line in str(caught.value)


def test_the_revision_of_a_draft_on_the_hub(target: Target, draft_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, kind: str, weights: bool, revision: str | None = None) -> Path:
        assert (name, kind, revision) == ("owner/draft", "draft", "r")
        return draft_dir

    monkeypatch.setattr(models, "fetch", fetch)
    assert models.resolve_draft(AuroraConfig(draft=Path("owner/draft")), target, "r").directory == draft_dir


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_draft(target: Target, draft_dir: Path, key: str) -> None:
    change_config(draft_dir, **{key: {"quant_method": "fp8"}})
    with pytest.raises(AuroraError, match=r"is quantised \(fp8\), and such weights cannot be updated"):
        checkpoint.read_draft(draft_dir, target)


def test_a_draft_without_a_tensor(target: Target, draft_dir: Path) -> None:
    tensors = load_file(draft_dir / "model.safetensors")
    del tensors["midlayer.hidden_norm.weight"]
    save_file(tensors, draft_dir / "model.safetensors")
    with pytest.raises(AuroraError, match=r"has no tensor midlayer\.hidden_norm\.weight"):
        checkpoint.read_draft(draft_dir, target)


def test_a_tensor_too_many(target: Target, draft_dir: Path) -> None:
    tensors = load_file(draft_dir / "model.safetensors") | {"midlayer.self_attn.q_norm.weight": torch.ones(8)}
    save_file(tensors, draft_dir / "model.safetensors")
    with pytest.raises(AuroraError, match=r"has a tensor midlayer\.self_attn\.q_norm\.weight \[8\], which no"):
        checkpoint.read_draft(draft_dir, target)


def test_an_embedding_of_another_vocabulary(target: Target, draft_dir: Path) -> None:
    tensors = load_file(draft_dir / "model.safetensors") | {"embed_tokens.weight": torch.zeros(7, HIDDEN)}
    save_file(tensors, draft_dir / "model.safetensors")
    with pytest.raises(AuroraError, match=r"embed_tokens\.weight is \[7, 16\], it should be \[100, 16\]"):
        checkpoint.read_draft(draft_dir, target)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_a_damaged_checkpoint(draft_dir: Path, size: int) -> None:
    file = draft_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(AuroraError, match="download it again"):
        checkpoint.read_shapes(draft_dir)


def test_no_checkpoint(tmp_path: Path, target: Target) -> None:
    with pytest.raises(AuroraError, match=r"holds no \*\.safetensors"):
        checkpoint.read_shapes(tmp_path)
    with pytest.raises(AuroraError, match=r"cannot read its config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AuroraError, match="is not JSON"):
        read_config(tmp_path)
    with pytest.raises(AuroraError, match="is no directory"):
        checkpoint.read_draft(tmp_path / "nowhere", target)


def test_the_fingerprint_follows_the_weights_and_the_settings(target: Target) -> None:
    first = checkpoint.fingerprint(target.directory, 64)
    assert first == checkpoint.fingerprint(target.directory, 64)
    assert first != checkpoint.fingerprint(target.directory, 65)
    save_file({"x": torch.zeros(3)}, target.directory / "model.safetensors")
    assert first != checkpoint.fingerprint(target.directory, 64)
    second = checkpoint.fingerprint(target.directory, 64)
    change_config(target.directory, rms_norm_eps=1e-5)
    assert second != checkpoint.fingerprint(target.directory, 64)


def test_the_planned_day0_draft_is_the_one_that_is_made(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TARGET.items() if k != "architectures"}))
    model.save_pretrained(target.directory)
    config = AuroraConfig(cache_dir=tmp_path / "cache", draft_vocab_size=64)
    planned = models.resolve_draft(config, target)
    assert planned.origin == "day-0, to be made"
    assert planned.directory.parent == tmp_path / "cache" / "day0"
    made = models.make_draft(planned, target, config)
    assert made == planned  # layers, vocabulary, names, shapes and dtypes
    again = models.resolve_draft(config, target)
    assert again == replace(planned, origin="day-0, cached")
    written = (again.directory / "model.safetensors").stat().st_mtime_ns
    models.make_draft(again, target, config)
    assert (again.directory / "model.safetensors").stat().st_mtime_ns == written

    weights = again.directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # a disk that was full, an upload cut short
    assert models.make_draft(again, target, config) == again
    assert len(load_file(weights)) > 0

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(day0, "save_file", full)
        unmade = AuroraConfig(cache_dir=tmp_path / "full", draft_vocab_size=64)
        with pytest.raises(AuroraError, match="No space left on device; choose another --aurora-cache-dir"):
            models.make_draft(models.resolve_draft(unmade, target), target, unmade)

    (tmp_path / "file").write_text("")  # a cache that cannot be written
    config = AuroraConfig(cache_dir=tmp_path / "file", draft_vocab_size=64)
    with pytest.raises(AuroraError, match="choose another --aurora-cache-dir"):
        models.make_draft(models.resolve_draft(config, target), target, config)


def test_servers_that_start_together_make_one_draft(target: Target, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TARGET.items() if k != "architectures"})).save_pretrained(
        target.directory
    )
    config = AuroraConfig(cache_dir=tmp_path / "cache", draft_vocab_size=64)
    planned, made = models.resolve_draft(config, target), []
    threads = [
        threading.Thread(target=lambda: made.append(models.make_draft(planned, target, config))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [planned] * 6
    assert [path.name for path in planned.directory.parent.iterdir()] == [planned.directory.name]


def test_no_room_in_shared_memory_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_shared_memory(1)
    monkeypatch.setattr(preflight, "free_bytes", lambda: 64 << 20)
    with pytest.raises(AuroraError, match=r"want 310 MiB .* has 64 free; give it more room"):
        preflight.check_shared_memory(310 << 20)


def test_targets_no_day0_draft_can_be_made_from(target: Target, tmp_path: Path) -> None:
    config = AuroraConfig(cache_dir=tmp_path)
    layers = read_config(target.directory)["num_hidden_layers"]
    change_config(target.directory, num_hidden_layers=1)
    with pytest.raises(AuroraError, match=r"owner/target: .* at least 2 layers.* give one with --aurora-draft"):
        models.resolve_draft(config, target)
    change_config(target.directory, num_hidden_layers=layers)
    planned = models.resolve_draft(config, target)
    with pytest.raises(
        AuroraError, match=r"owner/target: no day-0 draft .* no tensor .*; give one with --aurora-draft"
    ):
        models.make_draft(planned, target, config)
    assert not list(tmp_path.glob("**/*.safetensors")) or not planned.directory.exists()
    change_config(target.directory, quantization_config={"quant_method": "awq"})
    with pytest.raises(AuroraError, match="it is quantized; give one"):
        models.resolve_draft(config, target)


@pytest.fixture
def serve_plan(target: Target, draft_dir: Path) -> plan.ServePlan:
    probes = (Probe("a:b", True, "the tested source"),)
    draft = checkpoint.read_draft(draft_dir, target)
    return plan.make_plan(AuroraConfig(ring_mb=1), Namespace(), "0.32.0", target, draft, V1, probes)


def test_sizes(serve_plan: plan.ServePlan) -> None:
    row = 64 + 4 * (3 + 1) * HIDDEN  # 16 words of metadata; three aux states and the last, float32
    assert serve_plan.layout.row_bytes == row
    assert serve_plan.ring_rows == 2**20 // row
    assert serve_plan.ring_bytes == ring_bytes(row, 2**20 // row)
    assert serve_plan.bank_bytes == bank_bytes(serve_plan.draft.specs)


def test_a_ring_that_is_too_small(target: Target, draft_dir: Path) -> None:
    wide = replace(target, hidden_size=16384)
    with pytest.raises(AuroraError, match=r"--aurora-ring-mb 1 holds 3 rows .* at least 17, better 272"):
        draft = checkpoint.read_draft(draft_dir, target)
        plan.make_plan(AuroraConfig(ring_mb=1), Namespace(), "0.32.0", wide, draft, V1)


def test_vllms_arguments(serve_plan: plan.ServePlan) -> None:
    args = Namespace(
        port=80,
        worker_cls="auto",
        scheduler_cls=None,
        speculative_config={"draft-sample-method": "greedy", "model": "x"},
    )
    plan.apply(replace(serve_plan, copied_tokens=2), args)
    assert vars(args) == {
        "port": 80,
        "worker_cls": "aurora_vllm.spec_decode.worker.AuroraWorker",
        "scheduler_cls": "aurora_vllm.spec_decode.scheduler.AuroraScheduler",
        "speculative_config": {
            "draft_sample_method": "greedy",
            "method": "eagle3",
            "model": str(serve_plan.draft.directory),
            "num_speculative_tokens": 3,
        },
    }


def test_cached_blocks_are_kept_where_vllm_can(serve_plan: plan.ServePlan) -> None:
    args = Namespace(worker_cls="auto", scheduler_cls=None, speculative_config=None)
    plan.apply(serve_plan, args, speculative_fields={"disable_eagle_block_drop"})
    assert args.speculative_config["disable_eagle_block_drop"] is True
    args.speculative_config = {"disable-eagle-block-drop": False}  # the user wants it
    plan.apply(serve_plan, args, speculative_fields={"disable_eagle_block_drop"})
    assert args.speculative_config["disable_eagle_block_drop"] is False
    args.speculative_config = None
    fields = {"disable_eagle_block_drop", "disable_lookahead_block_hashes"}  # this vLLM knows what to keep
    plan.apply(serve_plan, args, speculative_fields=fields)
    assert "disable_eagle_block_drop" not in args.speculative_config


@pytest.mark.parametrize(
    ("runner", "settings", "flags", "most"),
    [
        (V1, {}, {}, 8),
        (V1, {"prompt_lookup_tokens": 12}, {}, 12),
        (V2, {"prompt_lookup_tokens": 12}, {}, 8),
        (V2, {"prompt_lookup_tokens": 4}, {}, 4),
        (V1, {"prompt_lookup": False}, {}, 0),
        (V2, {"speculate": "never"}, {}, 0),
        (V2, {}, {"speculative_config": {"draft-sample-method": "probabilistic"}}, 0),
        (V1, {}, {"enable_lora": True}, 3),
        (V2, {"prompt_lookup_tokens": 2}, {"enable_lora": True}, 2),
    ],
)
def test_how_much_is_copied(
    runner: ModelRunner, settings: dict[str, Any], flags: dict[str, Any], most: int, serve_plan: plan.ServePlan
) -> None:
    args = Namespace(**flags)
    config = AuroraConfig(ring_mb=1, **settings)
    made = plan.make_plan(config, args, "0.32.0", serve_plan.target, serve_plan.draft, runner)
    assert made.copied_tokens == most


def test_without_a_learner_the_ring_is_a_stub(serve_plan: plan.ServePlan) -> None:
    config = AuroraConfig(learn=False)
    made = plan.make_plan(config, Namespace(), "0.32.0", serve_plan.target, serve_plan.draft, V2, least_rows=16_384)
    assert made.ring_rows == plan.MIN_RING_ROWS and made.bank_bytes == serve_plan.bank_bytes


def test_v2_captures_graphs_for_every_draft_length(serve_plan: plan.ServePlan) -> None:
    """The table says K = 3, 2, 1 and 0 somewhere, and how long copies are; one of the user's stays."""
    args = Namespace(worker_cls="auto", scheduler_cls=None, speculative_config=None)
    for_v2 = replace(serve_plan, model_runner=V2, copied_tokens=8)
    plan.apply(for_v2, args)
    table = [[1, 1, 8], [2, 2, 3], [3, 3, 2], [4, 4, 1], [5, 5, 0]]
    assert args.speculative_config["num_speculative_tokens_per_batch_size"] == table
    assert args.speculative_config["num_speculative_tokens"] == 8
    assert _lengths(Namespace(**args.speculative_config)) == (1, 2, 3, 8)  # what our scheduler makes of it
    args.speculative_config = None
    plan.apply(replace(for_v2, copied_tokens=0), args)
    table = [[1, 1, 3], [2, 2, 2], [3, 3, 1], [4, 4, 0]]
    assert args.speculative_config["num_speculative_tokens_per_batch_size"] == table
    assert args.speculative_config["num_speculative_tokens"] == 3
    args.speculative_config = {"num-speculative-tokens-per-batch-size": [[1, 8, 2]]}
    plan.apply(for_v2, args)
    assert args.speculative_config["num_speculative_tokens_per_batch_size"] == [[1, 8, 2]]


def test_the_runner_is_shown(serve_plan: plan.ServePlan, capsys: Any) -> None:
    plan_view.show(serve_plan, "text")
    assert "model runner    V1 (no Triton for this device)\n" in capsys.readouterr().out
    assert plan_view.as_dict(serve_plan)["model_runner"] == {"name": "V1", "reason": "no Triton for this device"}


def test_shown_as_json(serve_plan: plan.ServePlan, capsys: Any) -> None:
    plan_view.show(serve_plan, "json")
    shown = json.loads(capsys.readouterr().out)
    assert shown == plan_view.as_dict(serve_plan)
    assert shown["memory"]["bank_bytes"] == serve_plan.bank_bytes
    assert shown["serves"] == "aurora"
    assert AuroraConfig(**shown["settings"]) == serve_plan.config


def test_settings_that_somebody_made_are_shown(serve_plan: plan.ServePlan, capsys: Any) -> None:
    for settings, line in ({}, "all defaults"), ({"ring_mb": 3, "learn": False}, "ring_mb=3 learn=False"):
        plan_view.show(replace(serve_plan, config=AuroraConfig(**settings)), "text")
        assert f"settings        {line}\n" in capsys.readouterr().out


def test_the_drafts_part_of_the_kv_cache(serve_plan: plan.ServePlan, capsys: Any) -> None:
    """One head of 8 channels keeps 8 keys and 8 values, float32; the target's eight layers keep as much each."""
    known = replace(serve_plan, target=replace(serve_plan.target, kv_width=8 * 16))
    assert plan_view.as_dict(known)["memory"]["kv_bytes_per_token"] == {"draft": 64, "target": 512}
    plan_view.show(known, "text")
    assert (
        "KV cache        0.1 KiB a token for the draft beside the target's 0.5 (11% of all)" in capsys.readouterr().out
    )
    plan_view.show(serve_plan, "text")  # a target whose layers do not all have one
    assert "KV cache        0.1 KiB a token for the draft\n" in capsys.readouterr().out


def test_every_key_of_an_aurora_file_is_shown(serve_plan: plan.ServePlan, tmp_path: Path, capsys: Any) -> None:
    content = {"training": {"seed": 3}, "decode": {"top_p": 0.9}}
    shown = replace(serve_plan, aurora_file=aurora_yaml.read(content, tmp_path / "a.yaml"))
    plan_view.show(shown, "text")
    out = capsys.readouterr().out
    assert f"Aurora's file   {tmp_path / 'a.yaml'}" in out
    assert "ok   training.seed: seed = 3" in out
    assert "NOT  decode.top_p: nothing is generated for training" in out
    keys = json.loads(json.dumps(plan_view.as_dict(shown)))["aurora_file"]["keys"]
    assert [(one["key"], one["honoured"]) for one in keys] == [("training.seed", True), ("decode.top_p", False)]


def test_shown_as_text(serve_plan: plan.ServePlan, capsys: Any, monkeypatch: Any) -> None:
    misfit = replace(serve_plan, probes=(*serve_plan.probes, Probe("c:d", False, "not in this vLLM")))
    plan_view.show(misfit, "text")
    out = capsys.readouterr().out
    for word in (
        "owner/target",
        "2, 4, 5",
        "0.32.0",
        "1 of 2 fit: serves plain vLLM",
        "c:d: not in this vLLM",
        "K up to 3",
    ):
        assert word in out
    assert plan_view.as_dict(misfit)["serves"] == "plain vLLM"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    plan_view.show(serve_plan, "text")
    assert "aurora_vllm would run" in capsys.readouterr().out
