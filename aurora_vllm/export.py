"""Export of a draft, from a checkpoint or any EAGLE-3 draft, to a directory in one of two formats.

eagle3        for ``vllm serve TARGET --speculative-config '{"method": "eagle3", "model": OUT, ...}'``
speculators   (format of speculators 0.9) for the same, and for ``vllm serve OUT``: it names its target itself
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from aurora_vllm.config_json import write_config
from aurora_vllm.errors import AuroraError
from aurora_vllm.learner import checkpoints
from aurora_vllm.learner.draft import checkpoint_tensors, load_config, load_draft, save_draft, stored_dtype
from aurora_vllm.learner.draft_files import speculators_name
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.staging import appears_whole

Format = Literal["eagle3", "speculators"]


def export(source: Path, out: Path, form: Format, verifier: str | None = None) -> Path:
    """Write a draft to ``out``, which appears complete or not at all.

    Args:
        source: a checkpoint, a directory of checkpoints (the newest is taken), or an EAGLE-3 draft in any format.
        out: must not exist, or must be empty.
        verifier: the target's name, for the speculators format; by default the target the checkpoint was trained for.

    Returns:
        The directory that was read.

    Raises:
        AuroraError: there is no draft, ``out`` is taken or cannot be written, or the format cannot hold this draft.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AuroraError(f"{out} exists already", "name a directory that does not")
    if not source.is_dir():
        raise AuroraError(f"{source} is no directory", "give a checkpoint, or a directory of checkpoints")
    source = checkpoints.newest(source) or source.resolve()
    draft, config = load_draft(source), load_config(source)
    described = speculators_config(draft.config, config, *_origin(source, verifier)) if form == "speculators" else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with appears_whole(out, private=False) as staging:
            if described is None:
                save_draft(draft, staging, config)
            else:
                tensors = {
                    speculators_name(name): tensor
                    for name, tensor in checkpoint_tensors(draft, stored_dtype(config)).items()
                }
                save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
                write_config(staging, described)
    except (OSError, SafetensorError) as error:
        raise AuroraError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
    return source


def speculators_config(
    draft: Eagle3Config, config: dict[str, Any], verifier: dict[str, Any], num_speculative_tokens: int
) -> dict[str, Any]:
    """The ``config.json`` of a draft in the speculators format (speculators/models/eagle3/config.py).

    Args:
        config: the draft's flat config.json, for the keys that do not change what it computes.
        verifier: ``name_or_path`` and ``architectures`` of the target.

    Raises:
        AuroraError: this draft scales its logits, which the format cannot express.
    """
    if draft.logit_scale != 1.0:
        raise AuroraError("the speculators format has no logit_scale", "export this draft with --format eagle3")
    kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    # All keys, not only those that differ from the defaults (speculators' to_diff_dict): vLLM fills in none.
    layer = {key: config[key] for key in kept if config.get(key) is not None}
    layer |= {
        key: getattr(draft, key)
        for key in (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
            "rms_norm_eps", "attention_bias", "mlp_bias",
        )
    }  # fmt: skip
    layer |= {
        "model_type": "qwen3" if draft.qk_norm else "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rope_parameters": draft.rope,
        "tie_word_embeddings": False,
    }
    if draft.num_aux_hidden_states != 3:  # vLLM's Llama layer does not count the ids below
        layer["num_aux_hidden_states"] = draft.num_aux_hidden_states
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_speculative_tokens}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": draft.draft_vocab_size,
        "target_hidden_size": draft.target_hidden_size,
        "norm_before_residual": draft.norm_before_residual,
        "norm_before_fc": draft.norm_before_fc,
        "fc_norm": draft.fc_norm,
        "norm_output": draft.norm_output,
        "eagle_aux_hidden_state_layer_ids": list(draft.aux_layer_ids) if draft.aux_layer_ids else None,
        "tie_word_embeddings": False,
        "torch_dtype": str(stored_dtype(config)).removeprefix("torch."),
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": verifier,
        },
    }


def _origin(source: Path, name: str | None) -> tuple[dict[str, Any], int]:
    """The target a draft was trained for, and the K it was served with; 3 where the draft does not say."""
    try:
        made_by = checkpoints.Checkpoint.read(source).facts["provenance"]
    except AuroraError:
        if name is None:
            raise AuroraError(f"{source} does not say which target it is for", "name it with --verifier") from None
        return {"name_or_path": name, "architectures": []}, 3
    target = {"name_or_path": name or made_by["target"]["model"], "architectures": made_by["target"]["architectures"]}
    return target, int(made_by["config"]["num_speculative_tokens"])
