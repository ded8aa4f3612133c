"""What a decode step costs: plain decoding, plus prices for verifying at all, per token verified and per token drafted.

    seconds = plain + verify * [V > 0] + per_token * V + per_draft * P

with V the draft tokens a step verifies, over all requests, and P the draft length the draft model is run for. These
are four numbers for each batch size, fitted by least squares to every pure decode step, with less weight for older
ones. What is verified varies from step to step anyway, so no experiments are needed. A prior gives the prices before
there is data, and where V and P never vary independently.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

REFIT_EVERY = 8  # steps, where many are remembered
MANY = 100.0
STEPS_TO_KNOW = 5  # plain steps after which the duration of plain decoding counts as known
MEMORY = 200.0  # steps after which one has lost 1 - 1/e of its weight
UNTRIED = np.array([0.0, 0.02, 0.03, 0.06])  # prices to assume, of a plain step: optimistic, so that they are tried
TRUST = np.array([0.0, 2.0, 20.0, 5.0])  # weight of these, as the sum of squares of that many steps
WEIGHT_IN_DOUBT = 0.01  # of a hundred verified tokens about one remains, against TRUST
OUTLIER = 1.4  # times the expected duration at which longer steps are clipped: something else slowed them


def batch_bucket(batch_size: int) -> int:
    """Batch sizes whose steps are pooled: 1, 2, 3, 4, then powers of two."""
    return batch_size if batch_size <= 4 else 1 << (batch_size - 1).bit_length()


@dataclass
class _Fit:
    untried: np.ndarray
    plain_steps: int = 0
    plain: list[float] = field(default_factory=list)  # the first plain steps, until they are known
    moments: np.ndarray = field(default_factory=lambda: np.zeros((4, 4)))  # of (1, [V > 0], V, P)
    products: np.ndarray = field(default_factory=lambda: np.zeros(4))  # with seconds
    prices: np.ndarray | None = None  # plain, verify, per token, per draft
    since: int = 0  # steps that these do not know yet

    def add(self, drafted: int, verified: int, seconds: float) -> None:
        row = _row(drafted, verified)
        if self.prices is not None:
            seconds = min(seconds, OUTLIER * float(row @ self.prices))
        keep = 1.0 - 1.0 / MEMORY
        self.moments = self.moments * keep + np.outer(row, row)
        self.products = self.products * keep + row * seconds
        if not drafted and not verified and self.plain_steps < STEPS_TO_KNOW:
            self.plain_steps += 1
            self.plain.append(seconds)
        self.since += 1
        is_due = self.since >= REFIT_EVERY or self.moments[0, 0] < MANY  # the weight of all steps
        if self.plain_steps >= STEPS_TO_KNOW and (self.prices is None or is_due):
            self._solve()

    def fade(self, weight: float) -> None:
        self.moments, self.products = self.moments * weight, self.products * weight
        if self.prices is not None:
            self._solve()

    def _solve(self) -> None:
        plain = float(np.median(self.plain)) if self.prices is None else float(self.prices[0])
        prior = TRUST * self.untried * plain
        free = np.ones(4, dtype=bool)
        for _ in range(4):  # a negative price is noise: it is set to 0, and the others are fitted without it
            found = np.zeros(4)
            part = self.moments[np.ix_(free, free)] + np.diag(TRUST[free])
            found[free] = np.linalg.solve(part, self.products[free] + prior[free])
            if (found >= 0.0).all():
                break
            free &= found >= 0.0
        self.prices, self.since = found, 0


def _row(drafted: float, verified: float) -> np.ndarray:
    return np.array([1.0, min(verified, 1.0), verified, drafted])


class StepCosts:
    """Prices by batch bucket, in seconds.

    Args:
        uniform: the same number of tokens is verified for every request. One more then is one for each of them, and
            the prior's price is for all of these together: else a large batch would never try it.
    """

    def __init__(self, uniform: bool = False) -> None:
        self._uniform = uniform
        self._fits: dict[int, _Fit] = {}

    def observe(self, batch_size: int, drafted: int, verified: int, seconds: float) -> None:
        """One step of decoding.

        Args:
            batch_size: number of requests.
            drafted: P, tokens the draft model proposed for each request at the end of the step.
            verified: V, draft tokens verified, over all requests.
            seconds: duration.
        """
        bucket = batch_bucket(batch_size)
        fit = self._fits.get(bucket)
        if fit is None:
            requests = np.array([1.0, 1.0, bucket if self._uniform else 1.0, 1.0])
            fit = self._fits[bucket] = _Fit(UNTRIED / requests)
        fit.add(drafted, verified, seconds)

    def doubt(self, bucket: int) -> None:
        """Weigh what was observed at this batch size so little that the prior's prices return. Plain decoding keeps its
        measured duration, which has no prior."""
        if (fit := self._fits.get(bucket)) is not None:
            fit.fade(WEIGHT_IN_DOUBT)

    def known(self, bucket: int) -> bool:
        """Whether plain decoding was measured at this batch size."""
        fit = self._fits.get(bucket)
        return fit is not None and fit.prices is not None

    def predict(self, bucket: int, drafted: float = 0.0, verified: float = 0.0) -> float:
        """Predicted duration of a step in seconds. Raises KeyError where nothing is known."""
        return float(self._prices(bucket) @ _row(drafted, verified))

    def per_token(self, bucket: int) -> float:
        """Seconds that one more verified token adds. Raises KeyError where nothing is known."""
        return float(self._prices(bucket)[2])

    def _prices(self, bucket: int) -> np.ndarray:
        fit = self._fits[bucket]
        if fit.prices is None:
            raise KeyError(bucket)
        return fit.prices
