"""A lesson for a draft on a GPU: computed on the host, where the replay is, and written into the draft.

Its normal equations take gigabytes and much computing time. The host has both to spare, while the GPU's memory and time
belong to serving.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.transport.placement import CPU


class HostLesson:
    """As :class:`Lesson`, for a draft on any device; keeps copies of draft and head on the host."""

    def __init__(self, draft: Eagle3Draft, head: TargetHead) -> None:
        self._draft, self._copy = draft, copy.deepcopy(draft).to(CPU)
        self._lesson = Lesson(self._copy, head.to(CPU))

    def start_over(self) -> None:
        """See :meth:`Lesson.start_over`."""
        self._lesson.start_over()

    @torch.no_grad()
    def run(self, trajectories: Sequence[Trajectory]) -> Iterator[None]:
        """See :meth:`Lesson.run`."""
        self._copy.load_state_dict(self._draft.state_dict())
        for _ in self._lesson.run(trajectories):
            yield
            if not torch.equal(self._copy.d2t, self._draft.d2t.to(CPU)):  # another vocabulary was chosen meanwhile
                self._copy.lm_head.weight.copy_(self._draft.lm_head.weight)
                self._copy.d2t.copy_(self._draft.d2t)
        self._draft.load_state_dict(self._copy.state_dict())
