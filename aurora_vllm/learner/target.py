"""The target's token embedding and lm_head, both frozen: all of the target that the learner needs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from aurora_vllm.config_json import read_text_config
from aurora_vllm.errors import PLAIN, AuroraError, DamagedFile
from aurora_vllm.learner.stored_tensors import StoredTensors

_VOCABULARY_CHUNK = 8192  # lm_head rows converted to float32 at a time
_SAMPLES, _SAMPLE_BYTES = 16, 65536  # of each file, for weights_fingerprint


class TargetHead:
    """Frozen ``embed_tokens`` [V, H] and ``lm_head`` [V, H], in their stored dtype; the same tensor if they are
    tied."""

    def __init__(self, embed_tokens: torch.Tensor, lm_head: torch.Tensor) -> None:
        self.embed_tokens = embed_tokens
        self.lm_head = lm_head
        self._ids: torch.Tensor | None = None
        self._rows = torch.empty(0)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def nbytes(self) -> int:
        """Bytes of both, or of the one tensor if they are tied."""
        return self.embed_tokens.nbytes + (self.lm_head.nbytes if self.lm_head is not self.embed_tokens else 0)

    def to(self, device: torch.device) -> TargetHead:
        """The same on a device; ``self`` if it is there already."""
        if device == self.device:
            return self
        embedding = self.embed_tokens.to(device)
        return TargetHead(embedding, embedding if self.lm_head is self.embed_tokens else self.lm_head.to(device))

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: int64 [...] -> float32 [..., H]."""
        return F.embedding(token_ids, self.embed_tokens).float()

    def rows(self, target_ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of lm_head for a draft vocabulary; the last result is cached. int64 [D] -> [D, H]."""
        if self._ids is None or self._rows.dtype != dtype or not torch.equal(self._ids, target_ids):
            self._ids, self._rows = target_ids.clone(), self.lm_head[target_ids].to(dtype)
        return self._rows

    @torch.no_grad()
    def argmax(self, last: torch.Tensor) -> torch.Tensor:
        """The target's first choice in its whole vocabulary, computed in chunks to save memory. [N, H] -> int64 [N]."""
        best = last.new_full((len(last),), -torch.inf, dtype=torch.float32)
        choice = torch.zeros(len(last), dtype=torch.int64, device=last.device)
        for start in range(0, len(self.lm_head), _VOCABULARY_CHUNK):
            logits = last.float() @ self.lm_head[start : start + _VOCABULARY_CHUNK].float().T  # [N, chunk]
            value, index = logits.max(dim=-1)
            better = value > best  # not >=, so that of equals the lowest id wins, as in torch.argmax
            best = torch.where(better, value, best)
            choice = torch.where(better, index + start, choice)
        return choice


def load_target_head(directory: Path) -> TargetHead:
    """Read the two tensors, and no others, of a safetensors checkpoint, sharded or not.

    Raises:
        AuroraError: no draft can be trained for this target, see :func:`check_learnable`; or there is no checkpoint, or
            no embedding in it.
    """
    check_learnable(directory)
    found: dict[str, torch.Tensor] = {}
    if (weights := _stored_tensors(directory)) is not None:
        for name in weights.names():
            for wanted in ("embed_tokens.weight", "lm_head.weight"):
                # "model.embed_tokens.weight", or "model.language_model.embed_tokens.weight" in multimodal targets
                if name == wanted or name.endswith("." + wanted):
                    found[wanted] = weights[name]
    if "embed_tokens.weight" not in found:
        raise AuroraError(f"no token embedding in {directory}", "a safetensors checkpoint of the target is needed")
    embedding = found["embed_tokens.weight"]
    tied = read_text_config(directory).get("tie_word_embeddings", False) or "lm_head.weight" not in found
    return TargetHead(embedding, embedding if tied else found["lm_head.weight"])


def lent_target_head(
    directory: Path, embedding: torch.Tensor, lm_head: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int]
) -> TargetHead:
    """The target's embedding and lm_head in the server's memory, without copies.

    Args:
        directory: of the target's checkpoint.
        embedding, lm_head: uint8, flat; at least [V, H] each, since vLLM pads a vocabulary; one tensor if tied.
        dtype: of their elements.
        shape: V, H.

    Raises:
        AuroraError: as :func:`check_learnable`; or there are fewer than V rows.
    """
    check_learnable(directory)
    vocabulary, hidden = shape
    views = []
    for tensor in (embedding, lm_head) if lm_head is not embedding else (embedding,):
        rows = tensor.view(dtype).view(-1, hidden)
        if len(rows) < vocabulary:
            raise AuroraError(f"the server lends {len(rows)} rows of the target's {vocabulary}: a part of a model?")
        views.append(rows[:vocabulary])
    return TargetHead(views[0], views[-1])


def check_learnable(directory: Path) -> None:
    """See by its config.json, and by the names of its tensors where they are there, that a draft can be trained for the
    target in a directory.

    Raises:
        AuroraError: its logits are not ``lm_head`` times its last hidden state, as the learner assumes, or its lm_head
            is quantized, or a file of it is damaged.
    """
    without_learner = f"--no-aurora-learn serves a draft that is given; {PLAIN}"
    config = read_text_config(directory)
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if config.get(key) not in (None, 1, 1.0):
            raise AuroraError(
                f"the target in {directory} transforms its logits ({key} {config[key]}), so no draft can be trained "
                "for it",
                without_learner,
            )
    weights = _stored_tensors(directory)
    for name in weights.names() if weights is not None else ():  # "lm_head.qweight", "lm_head.weight_scale"
        if name.rpartition(".")[0].endswith("lm_head") and not name.endswith((".weight", ".bias")):
            raise AuroraError(
                f"the target in {directory} has a quantized lm_head ({name}), so no draft can be trained for it",
                without_learner,
            )


def _stored_tensors(directory: Path) -> StoredTensors | None:
    """A checkpoint's tensors; None where it has no safetensors files, or not yet."""
    if not any(directory.glob("*.safetensors")):
        return None
    try:
        return StoredTensors(directory)
    except SafetensorError as error:
        raise DamagedFile(f"{directory} holds a damaged safetensors file: {error}", "download it again") from None


def weights_fingerprint(directory: Path) -> str:
    """A hash, 16 hex digits, of a checkpoint's weights; the same for a copy or another download of it.

    It covers each safetensors file's size and sixteen samples of 64 KiB, so that nobody waits for 100 GB to be read;
    another fine-tune of the same model differs in all of them.
    """
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as stream:
            for i in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
