"""The learner's two drafts: the incumbent, which it takes to be the one in use, and the candidate, which it trains.

A published candidate becomes the incumbent; a broken one is reset to the incumbent; a rollback or an update from disk
replaces both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.evaluate import Recent, Score


class DraftPair:
    """Incumbent and candidate.

    Each stays the same object, and they share no memory: weights are copied, so that the trainer may keep a reference
    to the candidate. Whoever changes it calls :meth:`candidate_changed`; the incumbent is changed only here.

    Args:
        draft: becomes the incumbent; the candidate begins as a copy of it.
        version: its version.
        lineage: its lineage (transport/bank.py, Publication).
        length: K.

    Attributes:
        incumbent, candidate: the drafts.
        version, lineage: of the incumbent.
        shadow: the incumbent's score on recent trajectories; reset when the incumbent changes.
        candidate_is_ahead: whether the candidate differs from the incumbent, and so is scored separately.
        candidate_founds_lineage: whether it differs by a lesson; it then is ahead, too.
    """

    def __init__(self, draft: Eagle3Draft, version: int, lineage: int, length: int) -> None:
        self.incumbent, self.candidate = draft, copy.deepcopy(draft)
        self._length = length
        self._both_are(version, lineage)

    def candidate_changed(self, founds_lineage: bool = False) -> None:
        """Its weights or its vocabulary changed. founds_lineage: by a lesson."""
        self.candidate_is_ahead = True
        self.candidate_founds_lineage |= founds_lineage

    def candidate_lineage(self, version: int) -> int:
        """The candidate's lineage if it is published as this version."""
        return version if self.candidate_founds_lineage else self.lineage

    def promote(self, version: int, score: Score) -> None:
        """The candidate was published, and becomes the incumbent. score: its score on the evidence."""
        self.incumbent.load_state_dict(self.candidate.state_dict())
        self._both_are(version, self.candidate_lineage(version))
        self.shadow.add(score)

    def reset_candidate(self) -> None:
        """Make the candidate a copy of the incumbent again."""
        self.candidate.load_state_dict(self.incumbent.state_dict())
        self.candidate_is_ahead = self.candidate_founds_lineage = False

    def replace(self, draft: Eagle3Draft, version: int, lineage: int) -> None:
        """Make both a copy of a draft that does not come from this training."""
        for one in (self.incumbent, self.candidate):
            one.load_state_dict(draft.state_dict())
        self._both_are(version, lineage)

    def resume_candidate(self, weights: Mapping[str, torch.Tensor], is_ahead: bool, founds_lineage: bool) -> None:
        """Restore a saved candidate of this incumbent: its ``state_dict`` and the two attributes."""
        self.candidate.load_state_dict(weights)
        self.candidate_is_ahead, self.candidate_founds_lineage = is_ahead, founds_lineage

    def _both_are(self, version: int, lineage: int) -> None:
        self.version, self.lineage = version, lineage
        self.candidate_is_ahead = self.candidate_founds_lineage = False
        self.shadow = Recent(self._length)
