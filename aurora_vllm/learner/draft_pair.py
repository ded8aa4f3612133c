"""The learner's two drafts: the incumbent, which it takes to be the one in use, and the candidate, which it trains.

A candidate that is published is the incumbent from then on; one that is found broken is made the incumbent again; after
a rollback or an update from disk both are another draft.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.evaluate import Recent, Score


class DraftPair:
    """Incumbent and candidate.

    Each stays the same object, and they share no memory: weights are copied from one to the other, so what trains the
    candidate may hold on to it. It is changed by others, who say so (:meth:`candidate_changed`); the incumbent is not.

    Args:
        draft: becomes the incumbent; the candidate begins as a copy of it.
        version: which one that is.
        lineage: of that version: transport/bank.py, Publication.
        length: K.

    Attributes:
        incumbent, candidate: the drafts.
        version, lineage: of the incumbent.
        shadow: the incumbent's score on recent trajectories; begins anew with another incumbent.
        candidate_is_ahead: it differs from the incumbent, so it has scores of its own.
        candidate_founds_lineage: it differs by a lesson, so it is ahead, too.
    """

    def __init__(self, draft: Eagle3Draft, version: int, lineage: int, length: int) -> None:
        self.incumbent, self.candidate = draft, copy.deepcopy(draft)
        self._length = length
        self._both_are(version, lineage)

    def candidate_changed(self, founds_lineage: bool = False) -> None:
        """Its weights or its vocabulary are others now. founds_lineage: by a lesson."""
        self.candidate_is_ahead = True
        self.candidate_founds_lineage |= founds_lineage

    def candidate_lineage(self, version: int) -> int:
        """The candidate's lineage if it is published as this version."""
        return version if self.candidate_founds_lineage else self.lineage

    def promote(self, version: int, score: Score) -> None:
        """The candidate was published, and is the incumbent now. score: its own, on the evidence that carried it."""
        self.incumbent.load_state_dict(self.candidate.state_dict())
        self._both_are(version, self.candidate_lineage(version))
        self.shadow.add(score)

    def reset_candidate(self) -> None:
        """The candidate is what the incumbent is, once more."""
        self.candidate.load_state_dict(self.incumbent.state_dict())
        self.candidate_is_ahead = self.candidate_founds_lineage = False

    def replace(self, draft: Eagle3Draft, version: int, lineage: int) -> None:
        """Both become a draft that no training here led to; it is copied."""
        for one in (self.incumbent, self.candidate):
            one.load_state_dict(draft.state_dict())
        self._both_are(version, lineage)

    def resume_candidate(self, weights: Mapping[str, torch.Tensor], is_ahead: bool, founds_lineage: bool) -> None:
        """Take up a candidate of this incumbent that was saved: its ``state_dict``, and the two attributes."""
        self.candidate.load_state_dict(weights)
        self.candidate_is_ahead, self.candidate_founds_lineage = is_ahead, founds_lineage

    def _both_are(self, version: int, lineage: int) -> None:
        self.version, self.lineage = version, lineage
        self.candidate_is_ahead = self.candidate_founds_lineage = False
        self.shadow = Recent(self._length)
