"""The weight bank: what is read is whole, what is held stays, and kill -9 of the learner costs at most its publish."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.transport.bank import Publication, TensorSpec, TornPublish, WeightBank, bank_bytes
from aurora_vllm.transport.segment import Segment
from tests.unit import transport_children as children

SPECS = [
    TensorSpec("fc.weight", (5, 7), torch.float32),
    TensorSpec("norm.weight", (9,), torch.bfloat16),
    TensorSpec("d2t", (3,), torch.int64),
]


def make(specs: list[TensorSpec] = SPECS) -> Segment:
    segment = Segment.create("bank", bank_bytes(specs))
    WeightBank.create(segment, specs)
    return segment


@pytest.fixture
def segment() -> Iterator[Segment]:
    with make() as made:
        yield made


def publish(bank: WeightBank, version: int) -> None:
    bank.publish(version, children.weights(bank, version), {"version": version})


def check(publication: Publication) -> None:
    """Every element of every tensor is of this version, and so is the evidence."""
    for name, tensor in publication.tensors.items():
        assert (tensor == publication.version % 120).all(), name
    assert publication.evidence == {"version": publication.version}


specs_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float64]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(shapes=specs_strategy, seed=st.integers(0, 2**31))
def test_what_is_published_is_read(shapes: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> None:
    specs = [TensorSpec(f"layer.{i}.weight", shape, dtype) for i, (shape, dtype) in enumerate(shapes)]
    random = torch.Generator().manual_seed(seed)
    with make(specs) as segment:
        learner, worker = WeightBank.attach(segment), WeightBank.attach(Segment.attach(segment.name))
        assert worker.specs == specs
        assert worker.published() == 0
        given_tensors = {
            spec.name: torch.randint(0, 100, spec.shape, generator=random).to(spec.dtype) for spec in specs
        }
        learner.publish(2, given_tensors, {"won_by": 0.25, "text": "ä"})
        assert worker.published() == 2
        publication = worker.read(2)
        assert list(publication.tensors) == [spec.name for spec in specs]
        for spec in specs:
            tensor = publication.tensors[spec.name]
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
            assert torch.equal(tensor, given_tensors[spec.name])
            assert tensor.data_ptr() % spec.dtype.itemsize == 0
        assert publication.evidence == {"won_by": 0.25, "text": "ä"}
        assert publication.still_valid()


@settings(max_examples=60)
@given(adopts=st.lists(st.sampled_from(["take", "rollback", "ignore"]), min_size=1, max_size=20))
def test_held_versions_are_never_overwritten(adopts: list[str]) -> None:
    """A worker that takes, ignores or takes back versions can always read the two it holds and the newest."""
    with make() as segment:
        learner, worker = WeightBank.attach(segment), WeightBank.attach(Segment.attach(segment.name))
        live, previous = 1, 0  # the checkpoint; not in the bank
        worker.hold(live, previous)
        views: dict[int, Publication] = {}
        for version, adopt in enumerate(adopts, start=2):
            publish(learner, version)
            check(worker.read(version))
            if adopt == "take":
                views[version] = worker.read(version)
                live, previous = version, live
            elif adopt == "rollback":
                live, previous = previous, live
            worker.hold(live, previous)
            assert worker.held() == (live, previous)
            for held in (live, previous):
                if held > 1:
                    check(worker.read(held))
                    check(views[held])  # the same memory, taken long ago
                    assert views[held].still_valid()


def test_a_version_whose_publish_was_not_said_is_not_taken_again(segment: Segment) -> None:
    """Two slots of one number would be mistaken for each other."""
    bank = WeightBank.attach(segment)
    assert bank.newest() == 0
    for version in (2, 3, 4):
        publish(bank, version)
    bank._learner.published = 3  # as where its writer was killed after the slot's last word
    assert (bank.published(), bank.newest()) == (3, 4)
    with pytest.raises(ValueError, match="not newer than 4"):
        publish(bank, 4)
    publish(bank, 5)
    check(bank.read(5))


def test_an_untaken_version_gives_way_to_a_newer_one_and_its_reader_notices(segment: Segment) -> None:
    learner, worker = WeightBank.attach(segment), WeightBank.attach(Segment.attach(segment.name))
    for version in (2, 3):
        publish(learner, version)
    worker.hold(live=3, previous=2)
    publish(learner, 4)
    untaken = worker.read(4)
    publish(learner, 5)
    assert not untaken.still_valid()
    with pytest.raises(TornPublish, match="version 4 is not in the bank"):
        worker.read(4)
    check(worker.read(5))


def test_older_free_slots_are_used_before_the_newest_version_is_lost(segment: Segment) -> None:
    bank = WeightBank.attach(segment)
    for version in range(2, 12):
        publish(bank, version)
        for kept in range(max(2, version - 2), version + 1):
            check(bank.read(kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "missing tensors: norm.weight"),
        ({"extra.weight": torch.zeros(1)}, "no place for: extra.weight"),
        ({"fc.weight": torch.zeros(7, 5)}, r"fc.weight: \(7, 5\)"),
        ({"fc.weight": torch.zeros(5, 7, dtype=torch.float64)}, r"fc.weight: .*float64"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(
    segment: Segment, change: dict[str, torch.Tensor | None], message: str
) -> None:
    bank = WeightBank.attach(segment)
    for version in (2, 3, 4):
        publish(bank, version)
    before = bytes(segment.buf)
    tensors = {name: t for name, t in (children.weights(bank, 5) | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        bank.publish(5, tensors, {})
    with pytest.raises(ValueError, match="not newer"):
        publish(bank, 4)
    with pytest.raises(ValueError, match="evidence of"):
        bank.publish(5, children.weights(bank, 5), {"text": "x" * 20000})
    assert bytes(segment.buf) == before


def test_parameters_that_need_gradients_can_be_published(segment: Segment) -> None:
    bank = WeightBank.attach(segment)
    tensors = children.weights(bank, 2)
    tensors["fc.weight"] = torch.nn.Parameter(tensors["fc.weight"].t().contiguous().t())  # and not contiguous
    bank.publish(2, tensors, {"version": 2})
    check(bank.read(2))


@pytest.mark.parametrize("where", ["weights", "evidence"])
def test_a_flipped_bit_is_found(segment: Segment, where: str) -> None:
    bank = WeightBank.attach(segment)
    publish(bank, 2)
    view = bank.read(2).tensors["norm.weight"] if where == "weights" else None
    if view is not None:
        view.view(torch.uint8)[3] ^= 4
    else:
        at = bytes(segment.buf).index(b'{"version": 2}')
        segment.buf[at + 12] ^= 1  # still JSON
    with pytest.raises(TornPublish, match="checksum"):
        bank.read(2)


@settings(max_examples=30)
@given(kill_at=st.integers(1, 220), held=st.booleans())
def test_publish_killed_anywhere(kill_at: int, held: bool) -> None:
    with make() as segment:
        worker = WeightBank.attach(segment)
        for version in (2, 3, 4):
            publish(worker, version)
        worker.hold(*((3, 2) if held else (1, 0)))
        kept = [worker.read(3), worker.read(2)]
        killed = children.finish(children.start(children.publish, segment.name, [5], kill_at)) == -9
        assert worker.published() == 5 if not killed else worker.published() in (4, 5)
        if held:
            for publication in kept:
                check(publication)
                assert publication.still_valid()
                check(worker.read(publication.version))
        for version in (2, 3, 4, 5):
            try:
                check(worker.read(version))
            except TornPublish:
                assert killed or version == (4 if held else 2)  # the one that made room
        if worker.published() == 5:
            check(worker.read(5))
        publish(WeightBank.attach(segment), 6)  # a restarted learner goes on
        check(worker.read(6))
        if held:
            check(worker.read(3))


def interrupted_publish(segment: Segment, at: int, learner: WeightBank, worker: WeightBank) -> tuple[bool, bool]:
    """Publish 5 while the worker takes 4 in the middle of it. (the interruption came, the worker took version 4)."""
    came = took = False

    def take() -> None:
        nonlocal came, took
        came = True
        try:
            publication = worker.read(4)
        except TornPublish:
            return
        worker.hold(live=4, previous=3)
        took = publication.still_valid()
        if not took:
            worker.hold(live=3, previous=2)

    tensors = children.weights(learner, 5)
    children.at_line(at, take)
    learner.publish(5, tensors, {"version": 5})
    children.at_line(0, take)
    return came, took


def test_worker_claims_a_version_at_any_line_of_a_publish() -> None:
    """The learner wants the slot of 4; wherever it stands when the worker takes 4, one of them gives way."""
    at, outcomes = 0, set()
    came = True
    while came:
        at += 1
        with make() as segment:
            learner, worker = WeightBank.attach(segment), WeightBank.attach(Segment.attach(segment.name))
            for version in (2, 3, 4):
                publish(learner, version)
            worker.hold(live=3, previous=2)
            came, took = interrupted_publish(segment, at, learner, worker)
            outcomes.add((came, took))
            check(worker.read(5))
            check(worker.read(3))
            if took:
                check(worker.read(4))
    assert outcomes == {(True, True), (True, False), (False, False)}
    assert at > 50


def test_learner_publishes_at_any_line_of_a_claim() -> None:
    """The same from the other side: between any two lines of read, hold and still_valid a whole publish happens."""
    at, outcomes = 0, set()
    came = True
    while came:
        at += 1
        came = took = False
        with make() as segment:
            learner, worker = WeightBank.attach(segment), WeightBank.attach(Segment.attach(segment.name))
            for version in (2, 3, 4):
                publish(learner, version)
            worker.hold(live=3, previous=2)
            tensors = children.weights(learner, 5)

            def intrude(learner: WeightBank = learner, tensors: dict[str, torch.Tensor] = tensors) -> None:
                nonlocal came
                came = True
                learner.publish(5, tensors, {"version": 5})

            children.at_line(at, intrude)
            try:
                publication = worker.read(4)
                worker.hold(live=4, previous=3)
                took = publication.still_valid()
            except TornPublish:
                pass
            children.at_line(0, intrude)
            outcomes.add((came, took))
            check(worker.read(3))
            if took:
                check(publication)
                check(worker.read(4))
    assert outcomes == {(True, True), (True, False), (False, True)}
    assert at > 30


def test_reader_beside_a_publishing_process_sees_whole_versions_or_none(segment: Segment) -> None:
    worker = WeightBank.attach(segment)
    publish(worker, 2)
    worker.hold(2, 0)
    child = children.start(children.publish, segment.name, list(range(3, 1500)))
    whole = torn = 0
    end = time.monotonic() + 30
    while worker.published() < 1499 and time.monotonic() < end:
        version = worker.published()
        try:
            publication = worker.read(version)
        except TornPublish:
            torn += 1
            continue
        copies = {name: tensor.clone() for name, tensor in publication.tensors.items()}
        if publication.still_valid():
            assert all((copy == version % 120).all() for copy in copies.values())
            whole += 1
        else:
            torn += 1
    assert children.finish(child) == 0
    assert whole > 20
    check(worker.read(2))


def test_attach_refuses_a_segment_without_a_bank() -> None:
    with Segment.create("test", 8192) as segment:
        with pytest.raises(ValueError, match="holds no weight bank"):
            WeightBank.attach(segment)
        with pytest.raises(ValueError, match="does not fit"):
            WeightBank.create(segment, [TensorSpec("a", (10000,), torch.float32)])
        with pytest.raises(ValueError, match="twice"):
            WeightBank.create(segment, [TensorSpec("a", (1,), torch.float32)] * 2)


@pytest.mark.parametrize("version", [0, -1, 1, 7])
def test_a_version_nobody_published_is_not_there(segment: Segment, version: int) -> None:
    with pytest.raises(TornPublish, match="not in the bank"):
        WeightBank.attach(segment).read(version)


def test_a_restarted_learner_takes_the_torn_slot_before_a_good_one(segment: Segment) -> None:
    bank = WeightBank.attach(segment)
    for version in (2, 3, 4):
        publish(bank, version)
    bank.hold(live=3, previous=2)
    assert children.finish(children.start(children.publish, segment.name, [5], 120)) == -9
    with pytest.raises(TornPublish):
        bank.read(4)
    bank.hold(live=3, previous=0)
    publish(WeightBank.attach(segment), 6)
    for version in (2, 3, 6):
        check(bank.read(version))
