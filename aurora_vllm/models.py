"""The target and the draft of a run: found or downloaded, checked against each other; a day-0 draft is made."""

from __future__ import annotations

import importlib
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aurora_vllm import checkpoint, resuming
from aurora_vllm.checkpoint import Draft, Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.config_json import read_config
from aurora_vllm.errors import PLAIN, AuroraError, first_line
from aurora_vllm.learner.target import check_learnable
from aurora_vllm.spec_decode.eagle3_support import takes_eagle3

GIVE_ONE = f"give one with --aurora-draft; {PLAIN}"


def resolve_target(args: Namespace, weights: bool) -> Target:
    """Find the target, and read its dtype and sizes from vLLM's own configuration of it.

    Args:
        weights: whether to download the weights of a model on the Hugging Face hub; else its configuration is enough.

    Raises:
        AuroraError: it does not exist, or is of a kind that Aurora does not serve.
    """
    directory = fetch(args.model, "model", weights, revision=args.revision, cache_dir=args.download_dir)
    config = read_config(directory)
    if "speculators_config" in config:
        verifier = config["speculators_config"].get("verifier", {}).get("name_or_path", "its target")
        raise AuroraError(
            f"{args.model} is a draft", f"serve its target ({verifier}) and give this one as --aurora-draft"
        )
    if weights:
        checkpoint.read_shapes(directory)  # raises where weights are missing or damaged
    model = _vllm_model_config(args)
    if model.runner_type != "generate":
        raise AuroraError(f"{args.model} does not generate text (vLLM's runner is {model.runner_type!r})", PLAIN)
    if not takes_eagle3(model.architecture):
        raise AuroraError(f"vLLM takes no EAGLE-3 draft for {args.model} (its {model.architecture})", PLAIN)
    return Target(
        model=args.model,
        directory=directory,
        hidden_size=model.get_hidden_size(),
        num_layers=model.hf_text_config.num_hidden_layers,
        vocab_size=model.get_vocab_size(),
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=model.max_model_len,
        kv_width=kv_width(model),
    )


def kv_width(model: Any) -> int | None:
    """See :class:`Target`. model: vLLM's ``ModelConfig``."""
    if model.use_mla or model.is_hybrid or model.is_attention_free:
        return None
    return int(2 * model.hf_text_config.num_hidden_layers * model.get_total_num_kv_heads() * model.get_head_size())


def resolve_draft(config: AuroraConfig, target: Target, revision: str | None = None) -> Draft:
    """The draft of this run: the resumed or the given one, checked, or the day-0 draft, which may not exist yet.

    Args:
        revision: of a given draft on the Hugging Face hub.

    Raises:
        AuroraError: it does not fit, or none can be made.
    """
    if config.learn:
        check_learnable(target.directory)
    resumed = resuming.resumed_draft(config, target)
    if resumed is not None:
        return resumed
    if config.draft is not None:
        return checkpoint.read_draft(fetch(str(config.draft), "draft", weights=True, revision=revision), target)
    from aurora_vllm.learner import day0  # imports torch

    model_config = read_config(target.directory)
    try:
        own = day0.draft_config(model_config, config.draft_vocab_size)
        specs = checkpoint.draft_specs(own, target.dtype)
        key = checkpoint.fingerprint(target.directory, config.draft_vocab_size, day0.RECIPE)
    except (ValueError, AuroraError) as error:
        raise AuroraError(f"{target.model}: {error}", GIVE_ONE) from None
    name = target.directory.name if Path(target.model).is_dir() else Path(target.model).name  # not the hub's commit
    directory = config.cache_dir / "day0" / f"{name}-{key}"
    origin = "day-0, cached" if (directory / "model.safetensors").is_file() else "day-0, to be made"
    aux_layers = tuple(own["eagle_aux_hidden_state_layer_ids"])
    return Draft(directory, origin, aux_layers, own["draft_vocab_size"], specs)


def make_draft(draft: Draft, target: Target, config: AuroraConfig) -> Draft:
    """Make the day-0 draft where it does not exist yet, or is damaged. Several servers may share one cache.

    Raises:
        AuroraError: no draft can be made from a target of this shape, or the draft cannot be written.
    """
    if draft.origin == "given":
        return draft
    if draft.origin == "resumed":
        resuming.check_same_target(draft, target)
        return draft
    from safetensors import SafetensorError

    from aurora_vllm.learner.day0 import make_day0_draft
    from aurora_vllm.learner.staging import alone_in

    def whole() -> Draft:
        return replace(checkpoint.read_draft(draft.directory, target), origin=draft.origin)

    with suppress(AuroraError):
        return whole()
    try:
        draft.directory.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(draft.directory.parent):
            with suppress(AuroraError):
                return whole()  # another server made it meanwhile
            make_day0_draft(target.directory, draft.directory, config.draft_vocab_size)  # not there, or damaged
    except (OSError, SafetensorError) as error:
        raise AuroraError(
            f"cannot make the day-0 draft in {draft.directory}: {error}", "choose another --aurora-cache-dir"
        ) from None
    except (ValueError, KeyError) as error:
        raise AuroraError(f"{target.model}: no day-0 draft can be made: {error}", GIVE_ONE) from None
    return whole()


def fetch(name: str, kind: str, weights: bool, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The directory of a checkpoint: a local one, or one downloaded from the Hugging Face hub.

    Args:
        kind: "model" or "draft", for messages.
        weights: whether to download safetensors files, too.

    Raises:
        AuroraError: it is not found in either place.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise AuroraError(f"{kind} {name} is a file", "Aurora needs a directory with config.json and *.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise AuroraError(
            f"{kind} {name} does not exist", "give a directory, or a model on the Hugging Face hub (owner/name)"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    if kind == "draft":
        patterns.append("*.bin")  # yuhuili's have no safetensors
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen types, and lets network errors through
        reason = first_line(error).rstrip(".") or type(error).__name__
        raise AuroraError(
            f"{kind} {name} is no directory here and cannot be had from the Hugging Face hub ({reason})",
            "check the name and the network",
        ) from None


def _vllm_model_config(args: Namespace) -> Any:
    """vLLM's ModelConfig. Dtype, sizes and runner are taken from it, since it is vLLM that runs the model."""
    platform = importlib.import_module("vllm.platforms").current_platform
    if hasattr(platform, "pre_register_and_update"):
        platform.pre_register_and_update()
    engine_args = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs.from_cli_args(args)
    try:
        return engine_args.create_model_config()
    except (ValidationError, ValueError, OSError) as error:
        faults = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise AuroraError(f"vLLM cannot serve {args.model}: {faults.strip().splitlines()[0]}") from None
