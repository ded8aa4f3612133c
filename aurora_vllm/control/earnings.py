"""The learner's share follows what speculation, and in the long run its own draft, saves.

On a busy machine, serving loses what the learner takes. So that a server is not slower than a plain one on the way to
being faster, the learner's share is bounded by a part of the time that speculation saves at present. What a step saved
is known when it is over (:meth:`DraftLengthController.settle`), from accepted tokens rather than expected ones. Where
nothing is saved yet there is a minimum share, because an untrained draft would never save anything.

At first, all that is saved counts, whoever proposed the tokens: an advance on what the draft will save. When the
learner has used that up, only the draft's own part counts. Where copies save the time, and a trained draft does not pay
beside them, a better one is not worth slower answers.

Where even a good draft would not pay (:mod:`aurora_vllm.control.prospect`), there is no advance, and another minimum:
the learner waits for time without traffic. Numbers in, decisions out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SPENT = 0.25  # of what is saved: a step beside the learner loses more than the learner takes, and users keep the rest
MEMORY_S = 10.0  # seconds after which a step has lost 1 - 1/e of its weight
EVERY_S = 1.0  # seconds between two decisions
ADVANCE_S = 60.0  # CPU seconds of the learner: its start and its lessons; 20 minutes at its default share


@dataclass
class Earnings:
    """The part of its share that the learner may take.

    Args:
        share: its largest share of a CPU.
        least: its minimum share of a CPU.
        resting: the same where drafting could not pay.
        advance_s: CPU seconds before its own draft has to earn its share.
    """

    share: float
    least: float
    resting: float
    advance_s: float = ADVANCE_S
    used_s: float = 0.0  # CPU seconds of the learner so far
    could_pay: bool = True  # drafting, if the draft were good
    saved: float = 0.0  # seconds for each second of the engine's steps
    _since: float = 0.0
    _drafted: float = 0.0  # accepted tokens that the draft proposed, and that were copied
    _copied: float = 0.0

    def accepted(self, tokens: int, copied: bool) -> None:
        """Tokens that the target accepted, of the step whose duration is told next."""
        if copied:
            self._copied += tokens
        else:
            self._drafted += tokens

    def observe(self, seconds: float, saved: float) -> bool:
        """One step. Returns whether it is time to read ``factor`` again.

        Args:
            seconds: duration of the step, prompts included.
            saved: seconds that plain decoding would have taken longer; negative where speculation lost.
        """
        keep = math.exp(-seconds / MEMORY_S)
        self._drafted, self._copied = self._drafted * keep, self._copied * keep
        self.saved = self.saved * keep + saved / MEMORY_S
        self._since += seconds
        due = self._since >= EVERY_S
        self._since = 0.0 if due else self._since
        return due

    @property
    def earned(self) -> float:
        """What counts of ``saved``."""
        if (self.used_s < self.advance_s and self.could_pay) or not self._copied:
            return self.saved
        return self.saved * self._drafted / (self._drafted + self._copied)

    @property
    def factor(self) -> float:
        """Factor on the learner's share, in 0..1."""
        return min(1.0, max(self._least, SPENT * self.earned) / self.share)

    @property
    def _least(self) -> float:
        return self.least if self.could_pay else self.resting

    @property
    def reason(self) -> str:
        """The factor in words."""
        allowed = f"{self.factor * self.share:.3f} of a CPU"
        saved = f"speculation {'saves' if self.saved >= 0 else 'loses'} {abs(self.saved):.2f} s a second"
        what = "what is saved"
        if self.earned != self.saved and self.saved >= 0:
            saved, what = f"of {self.saved:.2f} s a second, its draft saves {self.earned:.2f}", "what its draft saves"
        if self.factor >= 1.0:
            return f"{allowed}, all of its share: {saved}"
        if self.factor * self.share <= self._least:
            why = "its least share" if self.could_pay else "as even a good draft would not pay"
            return f"{allowed}, {why}: {saved}"
        return f"{allowed}, a quarter of {what}: {saved}"
