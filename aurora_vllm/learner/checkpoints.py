"""Checkpoints: what was learned, on disk, for the next server to go on from. Never any traffic.

A checkpoint is a directory that vLLM loads as a draft, plus what only the learner needs::

    checkpoint-000007/
        config.json, model.safetensors   the published draft, in the dtype it is served in
        learner/state.safetensors        the draft in training, the optimizer's moments, counts of emitted tokens
        learner/state.json               counters and provenance
    latest -> checkpoint-000007

It is flushed to disk and then appears by one rename: a save that is killed leaves earlier checkpoints as they were.
Counts of token ids are the only trace of the traffic: no order, no text, no request.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from aurora_vllm.errors import AuroraError, DamagedFile, unreadable
from aurora_vllm.learner.draft import Eagle3Draft, save_draft
from aurora_vllm.learner.staging import PARTIAL, alone_in, appears_whole, flush

FORMAT = 1
KEEP = 2  # checkpoints of a run and of the runs it goes on from, together
LATEST = "latest"
_PREFIX = "checkpoint-"
LEARNER, _TENSORS, _FACTS = "learner", "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. ``facts`` is its state.json."""

    directory: Path
    facts: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Checkpoint:
        """Raises DamagedFile if there is no checkpoint, or a damaged one, and AuroraError if its format is unknown."""
        file = directory / LEARNER / _FACTS
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            written = facts["format"]
            if not all(isinstance(facts[part], dict) for part in ("statistics", "provenance")):
                raise TypeError
        except OSError as error:
            raise unreadable(error)(f"{directory} is no checkpoint", f"one holds {LEARNER}/{_FACTS}") from None
        except (ValueError, KeyError, TypeError):
            raise DamagedFile(f"{file} is damaged, and with it the checkpoint") from None
        if written != FORMAT:
            raise AuroraError(f"checkpoint {directory} has format {written}, this version reads {FORMAT}")
        return cls(directory, facts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The learner's tensors. Raises AuroraError if the file is damaged."""
        file = self.directory / LEARNER / _TENSORS
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise AuroraError(f"{file} cannot be read: {error}") from None


def find(path: Path, checkpoint_dir: Path | None) -> list[Path]:
    """The checkpoint that ``--aurora-resume`` names; for "latest" all that exist, newest first.

    Args:
        path: a checkpoint, a directory of checkpoints (the newest is taken), or "latest".
        checkpoint_dir: where "latest" looks.

    Raises:
        AuroraError: there is none, or "latest" has no directory to look in.
    """
    if path == Path(LATEST):
        if checkpoint_dir is None:
            raise AuroraError("--aurora-resume latest: there is no --aurora-checkpoint-dir to look in")
        return _newest_first(checkpoint_dir)
    if not path.is_dir():
        raise AuroraError(f"checkpoint {path} is no directory")
    if not (path / LEARNER / _FACTS).is_file() and (inside := newest(path)) is not None:
        return [inside]
    return [Checkpoint.read(path.resolve()).directory]


def newest(checkpoint_dir: Path) -> Path | None:
    """The checkpoint ``latest`` points to; if that is no link, or a broken one, the one with the highest number."""
    return next(iter(_newest_first(checkpoint_dir)), None)


def _newest_first(checkpoint_dir: Path) -> list[Path]:
    pointed = checkpoint_dir / LATEST  # not a link if a copying tool followed it; such a copy may be old
    candidates = [path for _, path in reversed(_numbered(checkpoint_dir))]
    candidates = [pointed, *candidates] if pointed.is_symlink() else candidates
    whole = (path.resolve() for path in candidates if (path / LEARNER / _FACTS).is_file())
    return list(dict.fromkeys(whole))


class Checkpoints:
    """The checkpoints of one run; only its learner writes them.

    Args:
        directory: made if it is missing.
        run: a name that no other run has.
        provenance: written into every checkpoint.
        resumed: the checkpoint this run goes on from; never removed while it runs.
    """

    def __init__(self, directory: Path, run: str, provenance: Mapping[str, Any], resumed: Path | None = None) -> None:
        self.directory = directory
        self._run = run
        self._provenance = dict(provenance)
        self._spared = resumed
        base = Checkpoint.read(resumed) if resumed else None
        # Another run that goes on from the same checkpoint has the same ancestors; each prunes only its own line.
        self._ancestors = [*base.facts.get("ancestors", []), base.facts.get("run")] if base else []

    def newest_of_run(self) -> Checkpoint | None:
        """The newest checkpoint that this run wrote."""
        return next((one for one in self._readable() if one.facts.get("run") == self._run), None)

    def save(
        self,
        draft: Eagle3Draft,
        config: dict[str, Any],
        tensors: Mapping[str, torch.Tensor],
        statistics: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint, point ``latest`` to it, and remove all but the newest two.

        Args:
            draft: the published one.
            config: its config.json; ``torch_dtype`` is the dtype to write.
            tensors: what the learner needs to go on.
            statistics: its counters, for JSON.

        Raises:
            OSError, SafetensorError: it could not be written; earlier checkpoints are as they were.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = {"format": FORMAT, "run": self._run, "ancestors": self._ancestors, "statistics": dict(statistics)}
        with alone_in(self.directory):
            for leftover in self.directory.glob(PARTIAL):  # of a dead writer
                if leftover.is_symlink() or not leftover.is_dir():
                    leftover.unlink()
                else:
                    shutil.rmtree(leftover)
            existing = _numbered(self.directory)
            out = self.directory / f"{_PREFIX}{(existing[-1][0] if existing else 0) + 1:06d}"
            with appears_whole(out, private=True) as staging:
                save_draft(draft, staging, config)
                (staging / LEARNER).mkdir()
                save_file(
                    {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staging / LEARNER / _TENSORS
                )
                text = json.dumps(facts | {"provenance": self._provenance}, indent=2)
                (staging / LEARNER / _FACTS).write_text(text + "\n", encoding="utf-8")
            self._point_to(out)
            self._prune()
        return out

    def _point_to(self, out: Path) -> None:
        """Only a convenience: if links cannot be made, or a directory has that name, the highest number is the
        newest."""
        link = self.directory / PARTIAL.replace("*", LATEST)
        with suppress(OSError):
            link.symlink_to(out.name)
            link.replace(self.directory / LATEST)
        link.unlink(missing_ok=True)
        flush(self.directory)

    def _prune(self) -> None:
        ours = [one for one in self._readable() if self._is_ours(one)]
        for old in ours[KEEP:]:
            if self._spared is None or old.directory.resolve() != self._spared.resolve():
                # Renamed first, in one operation: a half-removed checkpoint must not look like one.
                gone = old.directory.rename(self.directory / PARTIAL.replace("*", old.directory.name))
                shutil.rmtree(gone, ignore_errors=True)

    def _is_ours(self, one: Checkpoint) -> bool:
        """Whether this run wrote it, or a run that this one goes on from, up to the resumed checkpoint."""
        if one.facts.get("run") == self._run:
            return True
        inherited = one.facts.get("run") in self._ancestors
        return inherited and self._spared is not None and one.directory.name <= self._spared.name

    def _readable(self) -> Iterator[Checkpoint]:
        """Checkpoints, newest first, without unreadable ones."""
        for _, path in reversed(_numbered(self.directory)):
            try:
                yield Checkpoint.read(path)
            except AuroraError:
                continue


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints by number, ascending."""
    paths = directory.glob(f"{_PREFIX}*") if directory.is_dir() else ()
    numbers = ((path.name.removeprefix(_PREFIX), path) for path in paths)
    return sorted((int(number), path) for number, path in numbers if number.isdigit())
