"""What a target's and a draft's checkpoints contain, and whether they fit together. Reads headers, never weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aurora_vllm.config_json import quantization, read_config, read_text_config
from aurora_vllm.errors import AuroraError, DamagedFile, unreadable
from aurora_vllm.learner.draft import Eagle3Draft, bank_specs
from aurora_vllm.learner.draft_files import canonical_name, flatten, read_tensors, weight_files
from aurora_vllm.learner.eagle3_config import Eagle3Config, aux_layer_ids
from aurora_vllm.transport.bank import TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The served model, as vLLM runs it."""

    model: str  # what the user wrote
    directory: Path
    hidden_size: int
    num_layers: int
    vocab_size: int
    dtype: str  # "float32", "bfloat16", ...
    max_model_len: int | None = None  # longest request vLLM takes, where known
    kv_width: int | None = None  # elements of a token's keys and values, all layers; None where a layer has none


@dataclass(frozen=True)
class Draft:
    """An EAGLE-3 draft: its origin, the target layers it reads from, and its trainable tensors."""

    directory: Path
    origin: str  # "given", "resumed", "day-0, cached", "day-0, to be made"
    aux_layers: tuple[int, ...]  # id k is the residual stream that enters the target's layer k
    vocab_size: int
    specs: tuple[TensorSpec, ...]  # by their Hugging Face names: what travels through the weight bank

    embedding: int = 0  # parameters of its own embedding, which is frozen; 0 where it uses the target's

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs if spec.name != "d2t")

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys and values."""
        return sum(spec.shape[0] for spec in self.specs if spec.name.endswith((".k_proj.weight", ".v_proj.weight")))


def read_shapes(directory: Path) -> dict[str, Shape]:
    """Shape of every tensor in a directory's safetensors files.

    The format: 8 bytes little-endian length of a JSON header, the header, the data
    (https://huggingface.co/docs/safetensors, "Format").

    Raises:
        DamagedFile: there are no safetensors files, or one is damaged.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DamagedFile(f"{directory} holds no *.safetensors files", "convert the checkpoint to safetensors")
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(size, 100_000_000)))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedFile(f"{file} is not a safetensors file", "download it again") from None
        except OSError as error:
            raise unreadable(error)(f"cannot read {file}: {error.strerror}") from None
        if file.stat().st_size < 8 + size + end:
            raise DamagedFile(f"{file} is cut short", "download it again")
    return shapes


def read_draft(directory: Path, target: Target) -> Draft:
    """Read the headers of a draft that was trained elsewhere, and check it against the target.

    Raises:
        AuroraError: it is not an EAGLE-3 draft, or does not fit this target; names the tensor and both shapes.
    """
    if not directory.is_dir():
        raise AuroraError(
            f"draft {directory} is no directory", "give one that holds config.json and *.safetensors, or none"
        )
    raw = read_config(directory)
    if quantised := quantization(raw):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise AuroraError(
            f"draft {directory} is quantised ({method}), and such weights cannot be updated while they serve",
            "use one in the target's own dtype, or none: then one is made",
        )
    config = flatten(raw)
    misfit = f"draft {directory} does not fit {target.model}"
    remedy = "use a draft trained for this target, or none: then one is made"
    for key in ("target_hidden_size", "hidden_size"):
        if config.get(key, target.hidden_size) != target.hidden_size:
            raise AuroraError(f"{misfit}: its {key} is {config[key]}, the target's is {target.hidden_size}", remedy)
    if config.get("vocab_size") != target.vocab_size:
        raise AuroraError(
            f"{misfit}: its vocab_size is {config.get('vocab_size')}, the target's is {target.vocab_size}", remedy
        )

    found = draft_shapes(directory)
    if "fc.weight" not in found:
        raise AuroraError(f"draft {directory} is no EAGLE-3 draft: it has no tensor fc.weight", remedy)
    aux_layers = _aux_layers(config, target, misfit)
    specs = draft_specs(config | {"num_aux_hidden_states": len(aux_layers)}, target.dtype)
    wanted_shapes = {spec.name: spec.shape for spec in specs} | {
        "embed_tokens.weight": (target.vocab_size, target.hidden_size)
    }
    draft_vocabulary = wanted_shapes["d2t"][0]
    optional = {"embed_tokens.weight"} | ({"d2t"} if draft_vocabulary == target.vocab_size else set())
    for name, shape in wanted_shapes.items():
        if name not in found and name not in optional:
            raise AuroraError(f"draft {directory} is no EAGLE-3 draft of one layer: it has no tensor {name}", remedy)
        if found.get(name, shape) != shape:
            raise AuroraError(f"{misfit}: tensor {name} is {list(found[name])}, it should be {list(shape)}", remedy)
    unknown = sorted(found.keys() - wanted_shapes.keys() - {"t2d"})
    if unknown:  # vLLM would refuse it as well, once the target is loaded
        one = f"{unknown[0]} {list(found[unknown[0]])}"
        raise AuroraError(f"draft {directory} has a tensor {one}, which no EAGLE-3 draft of its config has", remedy)
    embedding = math.prod(found.get("embed_tokens.weight", (0,)))
    return Draft(directory, "given", aux_layers, draft_vocabulary, specs, embedding)


def draft_shapes(directory: Path) -> dict[str, Shape]:
    """Shape of every tensor of a draft in any format that vLLM loads, by its EAGLE-3 name.

    Raises:
        AuroraError: there are no weights, or a file is damaged.
    """
    files = weight_files(directory)
    if files and files[0].suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(directory, "meta").items()}
    return {canonical_name(name): shape for name, shape in read_shapes(directory).items()}


def draft_specs(config: dict[str, Any], dtype: str) -> tuple[TensorSpec, ...]:
    """Specs of the tensors that the weight bank holds for a draft of this config. Allocates nothing.

    Raises:
        AuroraError: a key is missing, or asks for something that cannot be trained.
    """
    with torch.device("meta"):
        return tuple(bank_specs(Eagle3Draft(Eagle3Config.from_hf(config)), getattr(torch, dtype)))


def target_head_bytes(target: Target) -> int:
    """Bytes of the target's embedding and lm_head as stored; of the embedding alone where they are tied.

    Raises:
        AuroraError: there is no config.json.
    """
    config = read_text_config(target.directory)
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or target.dtype).split(".")[-1])
    matrices = 1 if config.get("tie_word_embeddings") else 2
    return int(matrices * target.vocab_size * target.hidden_size * stored.itemsize)


def fingerprint(directory: Path, *settings: object) -> str:
    """A hash, 16 hex digits, of a checkpoint's config, its weight files (name, size, mtime) and `settings`."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        status = file.stat()  # follows the hub cache's links
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:16]


def _aux_layers(config: Mapping[str, Any], target: Target, misfit: str) -> tuple[int, ...]:
    layers = aux_layer_ids(config) or (2, target.num_layers // 2, target.num_layers - 3)  # vLLM's default
    ascending = all(a < b for a, b in itertools.pairwise(layers))  # vLLM sorts them and drops doubles
    if not ascending or layers[0] < 0 or layers[-1] > target.num_layers:
        raise AuroraError(
            f"{misfit}: auxiliary layers {list(layers)} with {target.num_layers} target layers",
            "set eagle_aux_hidden_state_layer_ids in the draft's config.json to ascending ids",
        )
    return layers
