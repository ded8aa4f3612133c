"""Incumbent and candidate through whatever may happen to them, against the history of every version."""

from __future__ import annotations

import copy
import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.draft_pair import DraftPair
from aurora_vllm.learner.evaluate import Recent, Score
from tests.unit.tiny_world import World

LENGTH = 2
SCORES = st.builds(Score, st.integers(0, 90), st.tuples(st.integers(0, 90), st.integers(0, 90)))


def fill(draft: Eagle3Draft, number: int) -> None:
    """Instead of weights, the vocabulary included."""
    for tensor in draft.state_dict().values():
        tensor.fill_(number)


def holds(draft: Eagle3Draft, number: int) -> bool:
    return all(bool((tensor == number).all()) for tensor in draft.state_dict().values())


class PairMachine(RuleBasedStateMachine):
    """A learner that trains by counting, and the bank that its versions go to. A version's lineage is found by going
    back along its line."""

    @initialize()
    def begin(self) -> None:
        self.numbers = itertools.count()
        draft = World().draft()
        number = next(self.numbers)
        fill(draft, number)
        self.published = {1: number}  # by version: what it holds
        self.began_from: dict[int, int] = {}  # by version, the one it was trained from; a draft from disk from none
        self.taught: set[int] = set()  # versions with a lesson since the one before
        self.since: list[tuple[int, str]] = []  # what the candidate held since it left the incumbent, and by what
        self.shadow = Recent(LENGTH)
        self.pair = DraftPair(draft, 1, 0, LENGTH)
        self.drafts = self.pair.incumbent, self.pair.candidate

    @rule(what=st.sampled_from(["step", "vocabulary", "lesson"]))
    def train(self, what: str) -> None:
        number = next(self.numbers)
        fill(self.pair.candidate, number)
        self.pair.candidate_changed(founds_lineage=what == "lesson")
        self.since.append((number, what))

    @rule(score=SCORES)
    def score(self, score: Score) -> None:
        self.pair.shadow.add(score)
        self.shadow.add(score)

    @precondition(lambda self: self.since)
    @rule(score=SCORES)
    def publish(self, score: Score) -> None:
        version = max(self.published) + 1
        self.began_from[version] = self.pair.version
        if self.has_lesson():
            self.taught.add(version)
        self.published[version] = self.since[-1][0]
        assert self.pair.candidate_lineage(version) == self.lineage(version)
        self.pair.promote(version, score)
        self.since.clear()
        self.shadow = Recent(LENGTH)
        self.shadow.add(score)
        assert self.pair.version == version

    @rule()
    def find_the_candidate_broken(self) -> None:
        self.pair.reset_candidate()
        self.since.clear()

    @rule()
    def load_from_disk(self) -> None:
        version = max(self.published) + 1
        self.published[version] = next(self.numbers)
        self.replace(version)

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        self.replace(data.draw(st.sampled_from(sorted(self.published))))

    def replace(self, version: int) -> None:
        draft = copy.deepcopy(self.pair.incumbent)
        fill(draft, self.published[version])
        self.pair.replace(draft, version, self.lineage(version))
        fill(draft, -1)  # whoever gave it may do with it what he wants
        self.since.clear()
        self.shadow = Recent(LENGTH)
        assert self.pair.version == version

    @rule()
    def save_and_restart(self) -> None:
        old, draft = self.pair, copy.deepcopy(self.pair.incumbent)
        saved = copy.deepcopy(old.candidate.state_dict()), old.candidate_is_ahead, old.candidate_founds_lineage
        self.pair = DraftPair(draft, old.version, old.lineage, LENGTH)
        self.pair.resume_candidate(*saved)
        self.drafts = self.pair.incumbent, self.pair.candidate
        self.shadow = Recent(LENGTH)
        assert self.pair.incumbent is draft

    def has_lesson(self) -> bool:
        return any(what == "lesson" for _, what in self.since)

    def lineage(self, version: int) -> int:
        while version != 1 and version not in self.taught and version in self.began_from:
            version = self.began_from[version]
        return 0 if version == 1 else version

    @invariant()
    def the_incumbent_is_the_version_that_it_says(self) -> None:
        assert holds(self.pair.incumbent, self.published[self.pair.version])
        assert self.pair.lineage == self.lineage(self.pair.version)

    @invariant()
    def the_candidate_is_the_incumbent_or_says_that_it_is_ahead(self) -> None:
        number = self.since[-1][0] if self.since else self.published[self.pair.version]
        assert holds(self.pair.candidate, number)
        assert self.pair.candidate_is_ahead == bool(self.since)
        assert self.pair.candidate_founds_lineage == self.has_lesson()

    @invariant()
    def the_shadow_is_of_the_incumbent(self) -> None:
        assert self.pair.shadow == self.shadow

    @invariant()
    def they_stay_the_same_two_drafts(self) -> None:
        assert (self.pair.incumbent, self.pair.candidate) == self.drafts  # modules are equal where they are the same
        mine, other = ({t.data_ptr() for t in draft.state_dict().values()} for draft in self.drafts)
        assert not mine & other


TestPair = PairMachine.TestCase
TestPair.settings = settings(max_examples=50, stateful_step_count=20)
