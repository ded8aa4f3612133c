"""Plans which prompts are sent in which order, and to which arms. Pure: prompts in, slots out.

A slot is one window of requests. Every arm of a slot gets the same prompts in the same order, one arm after the other.
No prompt is in two slots, and ``day0`` and ``shift`` are measured on problems that no learning window had.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from aurora_vllm.errors import AuroraError
from benchmarks.adaptation.prompts import CODING, FILE, FUNCTIONS, MATHEMATICS
from demo.workload import Prompt, Workload

WORKLOADS = ("day0", "shift", "mixed", "sampled", "crowd")
ARMS = ("plain", "ngram", "suffix", "copies", "static", "frozen", "aurora", "k0")
LEARN, MEASURE = "learn", "measure"  # parts of a workload
LEARN_CONCURRENCY = 4
CROWD = 16


@dataclass(frozen=True)
class Sizes:
    """The size of a run."""

    window: int = 50  # requests per window
    answer_tokens: int = 56  # longest answer
    learn_windows: int = 6  # windows of day0 before it is measured
    measure_windows: int = 2  # measured windows of day0 at each concurrency
    domain_windows: int = 3  # windows of each domain after a shift; the last third is measured, at concurrency 1
    other_windows: int = 1  # windows of mixed and of sampled; twice as many of crowd, which is quick
    plain_every: int = 2  # of the learning windows, plain vLLM gets every so many
    idle_s: int = 0  # seconds without traffic before anything is measured, for the learner to catch up


SMOKE = Sizes(window=4, answer_tokens=8, learn_windows=1, measure_windows=1)


@dataclass(frozen=True)
class Slot:
    """The same prompts for several arms, one after the other."""

    workload: str
    part: str  # LEARN: traffic to learn from; MEASURE: what the figures are computed from
    domain: str
    prompts: tuple[Prompt, ...]
    concurrency: int
    temperature: float
    arms: tuple[str, ...]


def make_plan(
    workloads: Sequence[str], sizes: Sizes, domains: Mapping[str, Workload], arms: Sequence[str], seed: int
) -> list[Slot]:
    """The slots of a run, in order.

    Args:
        workloads: some of WORKLOADS, or FILE for the domain of that name.
        domains: prompts by domain; a shift goes through those that are available.
        arms: the arms that may take part.
        seed: of the order of mixed prompts.

    Raises:
        AuroraError: a domain has too few prompts, or a shift has nothing to shift from.
    """
    planner = _Planner(sizes, domains, seed)
    slots: list[Slot] = []
    for workload in (FILE, *WORKLOADS):
        if workload in workloads:
            slots += getattr(planner, workload)()
    if "shift" in workloads and "day0" not in workloads:
        raise AuroraError("workload shift moves away from what day0 learned", "name both: --workloads day0,shift")
    chosen = [_only(slot, arms) for slot in slots]
    return [slot for slot in chosen if slot.arms]


def order(arms: Sequence[str], turn: int) -> list[str]:
    """The arms' order in a slot: the arm that goes first alternates."""
    return list(arms) if turn % 2 == 0 else list(reversed(arms))


class _Planner:
    def __init__(self, sizes: Sizes, domains: Mapping[str, Workload], seed: int) -> None:
        self._sizes, self._rng = sizes, random.Random(seed)
        self._learn = {name: iter(workload.learn) for name, workload in domains.items()}
        self._unseen = {name: iter(workload.unseen) for name, workload in domains.items()}

    def day0(self) -> list[Slot]:
        """One domain: the learner's first requests, then unseen problems."""
        # Suffix decoding and copies learn, too: they copy from earlier answers.
        every_arm, between = ("plain", "k0", "suffix", "copies", "aurora"), ("suffix", "copies", "aurora")
        slots = self._learning("day0", CODING, self._sizes.learn_windows, every_arm, between)
        for concurrency in (1, LEARN_CONCURRENCY):
            for i in range(self._sizes.measure_windows):
                arms: tuple[str, ...] = ("plain", "copies", "aurora")
                if i == 0:
                    arms = ("plain", "ngram", "suffix", "copies", "static", "aurora")
                slots.append(self._slot("day0", MEASURE, CODING, self._unseen[CODING], concurrency, arms))
        return slots

    def shift(self) -> list[Slot]:
        """Other domains, one after the other. The static draft is what was learned from the first domain."""
        slots = []
        available = [domain for domain in (FUNCTIONS, MATHEMATICS) if domain in self._learn]
        measured = max(1, self._sizes.domain_windows // 3)
        for domain in available:
            unmeasured = self._sizes.domain_windows - measured
            slots += self._learning("shift", domain, unmeasured, ("plain", "frozen", "aurora"), ("frozen", "aurora"))
            for i in range(measured):
                # Compared with the static draft. Plain vLLM is the slowest, so it gets only the last of these windows.
                last = domain == available[-1] and i == measured - 1
                arms = ("plain", "static", "frozen", "aurora") if last else ("static", "frozen", "aurora")
                slots.append(self._slot("shift", MEASURE, domain, self._unseen[domain], 1, arms))
        return slots

    def mixed(self) -> list[Slot]:
        """All domains mixed, if there are several."""
        if len(self._learn) == 1:
            return []
        arms = ("plain", "suffix", "static", "aurora")
        window = self._sizes.window
        return [self._mix("mixed", LEARN_CONCURRENCY, arms, window) for _ in range(self._sizes.other_windows)]

    def sampled(self) -> list[Slot]:
        """Temperature 1. vLLM 0.32 samples wrongly when it speculates on a CPU, so its own methods are left out."""
        arms, window = ("plain", "aurora"), self._sizes.window
        return [self._mix("sampled", LEARN_CONCURRENCY, arms, window, 1.0) for _ in range(self._sizes.other_windows)]

    def crowd(self) -> list[Slot]:
        """Sixteen requests at a time, for at least twice as many; at far fewer, a CPU is already compute-bound."""
        arms, requests = ("plain", "aurora"), max(self._sizes.window, 2 * CROWD)
        return [self._mix("crowd", CROWD, arms, requests) for _ in range(2 * self._sizes.other_windows)]

    def file(self) -> list[Slot]:
        """The user's prompts, in the file's order: two thirds to learn from, the rest measured at concurrency 1."""
        prompts = list(self._learn[FILE])
        size = min(self._sizes.window, max(1, len(prompts) // 2))
        windows = [tuple(prompts[i : i + size]) for i in range(0, len(prompts) - size + 1, size)]
        measured = max(1, len(windows) // 3)
        arms = ("plain", "ngram", "suffix", "static", "aurora")
        slots = []
        for i, window in enumerate(windows):
            learns = i < len(windows) - measured
            concurrency = LEARN_CONCURRENCY if learns else 1
            takers = ("plain", "aurora") if learns else arms
            slots.append(Slot(FILE, LEARN if learns else MEASURE, FILE, window, concurrency, 0.0, takers))
        return slots

    def _learning(
        self, workload: str, domain: str, windows: int, arms: tuple[str, ...], between: tuple[str, ...]
    ) -> list[Slot]:
        """Learning windows. Every ``plain_every``-th goes to ``arms``, the others to the arms in ``between``."""
        return [
            self._slot(
                workload, LEARN, domain, self._learn[domain], LEARN_CONCURRENCY,
                arms if i % self._sizes.plain_every == 0 else between,
            )
            for i in range(windows)
        ]  # fmt: skip

    def _slot(
        self, workload: str, part: str, domain: str, source: Iterator[Prompt], concurrency: int, arms: tuple[str, ...]
    ) -> Slot:
        return Slot(workload, part, domain, _take(source, self._sizes.window, domain), concurrency, 0.0, arms)

    def _mix(
        self, workload: str, concurrency: int, arms: tuple[str, ...], requests: int, temperature: float = 0.0
    ) -> Slot:
        names = itertools.islice(itertools.cycle(self._learn), requests)
        prompts = [prompt for name in names for prompt in _take(self._learn[name], 1, name)]
        self._rng.shuffle(prompts)
        return Slot(workload, MEASURE, "mixed", tuple(prompts), concurrency, temperature, arms)


def _take(source: Iterator[Prompt], count: int, domain: str) -> tuple[Prompt, ...]:
    taken = tuple(itertools.islice(source, count))
    if len(taken) < count:
        raise AuroraError(f"the domain {domain} has too few prompts for so many and so large windows", "ask for fewer")
    return taken


def _only(slot: Slot, arms: Sequence[str]) -> Slot:
    kept = tuple(arm for arm in slot.arms if arm in arms)
    return Slot(slot.workload, slot.part, slot.domain, slot.prompts, slot.concurrency, slot.temperature, kept)
