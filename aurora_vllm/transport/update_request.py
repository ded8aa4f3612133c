"""The server asks the learner to publish a draft from disk: one request at a time, over the control block.

The weight bank has one writer, the learner, so the server has to ask it. Each side writes one text field, which others
read as a whole: ``server.update_request`` holds "number directory", ``learner.update_answer`` "number version message".
A request is open while the numbers differ; one without a directory was withdrawn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from aurora_vllm.transport.control import ControlBlock, ServerBlock

POLL_S = 0.02


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    version: int  # the version the draft was published as; 0 where it was refused
    message: str


@dataclass(frozen=True)
class UpdateRequest:
    """A request that the learner has not answered yet."""

    number: int
    directory: str


def ask(control: ControlBlock, directory: str, timeout_s: float) -> Answer:
    """Ask the learner, and wait. Only one thread of the server at a time may call this.

    Args:
        directory: of an EAGLE-3 checkpoint.
        timeout_s: how long to wait; the request is then withdrawn.
    """
    if len(directory.encode()) > ServerBlock.update_request.width - 32 or "\0" in directory:
        return Answer(0, "model_path is too long, or no path")
    number = _number(control.server.update_request) + 1
    control.server.update_request = f"{number} {directory}"
    deadline = time.monotonic() + timeout_s
    while _number(control.learner.update_answer) != number:
        if time.monotonic() > deadline:
            control.server.update_request = f"{number + 1} "
            return Answer(
                0, f"the learner did not answer within {timeout_s:g} s; where it had begun, it may still publish"
            )
        time.sleep(POLL_S)
    _, version, message = control.learner.update_answer.split(" ", 2)
    return Answer(int(version), message)


def open_request(control: ControlBlock) -> UpdateRequest | None:
    """The open request, if any. Two short reads: cheap enough for every turn."""
    text = control.server.update_request
    number = _number(text)
    if number == _number(control.learner.update_answer):
        return None
    request = UpdateRequest(number, text.partition(" ")[2])
    if not request.directory:
        answer(control, request, Answer(0, "withdrawn"))
        return None
    return request


def answer(control: ControlBlock, request: UpdateRequest, given: Answer) -> None:
    """Close a request. Only the learner calls this."""
    control.learner.update_answer = f"{request.number} {given.version} {given.message}"


def refuse_open(control: ControlBlock) -> None:
    """Refuse an open request. A new learner does this first, because its predecessor may have died over it."""
    if request := open_request(control):
        answer(control, request, Answer(0, "the learner was started again meanwhile; ask again"))


def _number(text: str) -> int:
    return int(text.partition(" ")[0] or 0)
