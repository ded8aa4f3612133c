"""One request at a time from the server to the learner: answered once, withdrawn, or refused by the next learner."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.segment import Segment
from aurora_vllm.transport.update_request import Answer, answer, ask, open_request, refuse_open


@pytest.fixture
def control() -> Iterator[ControlBlock]:
    with Segment.create("control", control_bytes()) as block:
        yield ControlBlock.create(block)


def asked(control: ControlBlock, directory: str, timeout_s: float = 20.0) -> tuple[threading.Thread, list[Answer]]:
    given: list[Answer] = []
    thread = threading.Thread(target=lambda: given.append(ask(control, directory, timeout_s)))
    thread.start()
    return thread, given


def wait_for_request(control: ControlBlock) -> object:
    for _ in range(2000):
        if request := open_request(control):
            return request
        threading.Event().wait(0.005)
    raise AssertionError("no request came")


@pytest.mark.parametrize("directory", ["/d", "/with a space/é", "/" + "x" * 4000])
def test_a_request_is_answered_once(control: ControlBlock, directory: str) -> None:
    assert open_request(control) is None
    for number, reply in ((1, Answer(7, "done and done")), (2, Answer(0, "no"))):
        thread, given = asked(control, directory)
        request = wait_for_request(control)
        assert (request.number, request.directory) == (number, directory)  # type: ignore[attr-defined]
        answer(control, request, reply)  # type: ignore[arg-type]
        thread.join()
        assert given == [reply]
        assert open_request(control) is None


def test_without_an_answer_it_is_withdrawn(control: ControlBlock) -> None:
    assert ask(control, "/d", 0.05) == Answer(
        0, "the learner did not answer within 0.05 s; where it had begun, it may still publish"
    )
    assert open_request(control) is None
    thread, given = asked(control, "/e")
    answer(control, wait_for_request(control), Answer(3, "ok"))  # type: ignore[arg-type]
    thread.join()
    assert given == [Answer(3, "ok")]


def test_a_new_learner_refuses_what_the_old_one_may_have_died_over(control: ControlBlock) -> None:
    refuse_open(control)
    thread, given = asked(control, "/d")
    wait_for_request(control)
    refuse_open(control)
    thread.join()
    assert given == [Answer(0, "the learner was started again meanwhile; ask again")]


@pytest.mark.parametrize("directory", ["/" + "x" * 5000, "/a\0b"])
def test_what_does_not_fit_is_not_asked(control: ControlBlock, directory: str) -> None:
    assert ask(control, directory, 20.0).version == 0
    assert open_request(control) is None
