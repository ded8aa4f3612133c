"""Publishes a draft from disk in place of the one in use. It was asked for, so it needs no evidence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from aurora_vllm.config_json import read_config
from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.draft import Eagle3Draft, load_tensors
from aurora_vllm.learner.draft_files import flatten, read_tensors
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.publish import publish
from aurora_vllm.transport.bank import WeightBank


def publish_from_disk(
    bank: WeightBank, version: int, directory: Path, running: Eagle3Draft, target_embedding: Callable[[], torch.Tensor]
) -> Eagle3Draft:
    """Check an EAGLE-3 checkpoint against the running draft, and publish it. Only the bank's writer calls this.

    Args:
        version: larger than every published one.
        running: the draft to be replaced; not changed.
        target_embedding: returns the target's token embedding [V, H]; called only if exactly one of the two drafts has
            its own embedding.

    Returns:
        The new draft, float32.

    Raises:
        AuroraError: it is not a checkpoint, or does not fit; names the file, key or tensor. Nothing was published.
    """
    draft = read_replacement(directory, running, target_embedding)
    try:
        publish(bank, version, draft, {"reason": "asked for, from disk", "lineage": version})
    except ValueError as error:
        raise AuroraError(f"{directory}: {error}") from None
    return draft


def read_replacement(
    directory: Path, running: Eagle3Draft, target_embedding: Callable[[], torch.Tensor]
) -> Eagle3Draft:
    """Read and check the draft, see :func:`publish_from_disk`."""
    _check_config(directory, running.config)
    tensors = read_tensors(directory)
    for name, tensor in tensors.items():
        if name != "t2d" and tensor.is_floating_point() == (name == "d2t"):
            raise AuroraError(f"{directory}: tensor {name} has dtype {tensor.dtype}")
    draft = copy.deepcopy(running)
    try:
        load_tensors(draft, tensors)
    except AuroraError as error:
        raise AuroraError(f"{directory}: {error}") from None
    _check_vocabulary(directory, draft)
    # The embedding is not in the bank: vLLM keeps the one it loaded, so the draft must have been trained with the same.
    own, live = draft.embed_tokens, running.embed_tokens
    if not (own is None and live is None):
        other = target_embedding() if own is None or live is None else None
        if not _same(own if own is not None else other, live if live is not None else other):
            raise AuroraError(f"{directory}: tensor embed_tokens.weight is not the embedding in use, which is frozen")
    draft.embed_tokens = live
    return draft


def _check_config(directory: Path, running: Eagle3Config) -> None:
    if not directory.is_dir():
        raise AuroraError(f"{directory} is no directory")
    config = read_config(directory)
    try:
        found = Eagle3Config.from_hf(flatten(config))
    except (ValueError, TypeError, AttributeError) as error:
        raise AuroraError(f"{directory}: no usable config.json ({error})") from None
    except AuroraError as error:
        raise AuroraError(f"{directory}: {error}") from None
    for key in (field.name for field in fields(Eagle3Config)):
        new, old = getattr(found, key), getattr(running, key)
        if new != old and not (key == "aux_layer_ids" and None in (new, old)):
            raise AuroraError(f"{directory}: its config has {key} = {new!r}, the running draft's has {old!r}")


def _check_vocabulary(directory: Path, draft: Eagle3Draft) -> None:
    """A target id out of range would end the engine at the first proposal."""
    ids = draft.target_ids
    if int(ids.min()) < 0 or int(ids.max()) >= draft.config.vocab_size or len(ids.unique()) < len(ids):
        raise AuroraError(f"{directory}: tensor d2t is no map into the target's {draft.config.vocab_size} tokens")


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two embeddings are equal, up to rounding to a 16-bit dtype."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return any(torch.equal(a.to(dtype), b.to(dtype)) for dtype in (torch.bfloat16, torch.float16))
