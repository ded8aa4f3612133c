"""Sends a block of prompts to a server, a fixed number at a time, and times the block as a whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import httpx

from demo.workload import Prompt

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Answer:
    """A finished request."""

    prompt: Prompt
    at: float  # seconds since its block began
    tokens: int  # generated ones
    text: str


@dataclass
class Block:
    """Requests that were sent to one server without a pause between them."""

    arm: str
    concurrency: int
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def rate(self) -> float:
        """Generated tokens per second, over the whole block."""
        return self.tokens / self.seconds if self.seconds else 0.0


async def drive(
    arm: str,
    url: str,
    model: str,
    prompts: Iterable[Prompt],
    concurrency: int,
    max_tokens: int,
    finished: Callable[[Answer], None] = lambda answer: None,
    until: float = float("inf"),
) -> Block:
    """Send the prompts, ``concurrency`` at a time.

    Args:
        finished: called with each answer.
        until: value of ``time.monotonic()`` after which no further prompt is sent.

    Raises:
        httpx.HTTPError: a request failed.
    """
    block = Block(arm, concurrency)
    queue = iter(prompts)
    started = time.monotonic()

    async def worker(client: httpx.AsyncClient) -> None:
        for prompt in queue:
            if time.monotonic() > until:
                return
            response = await client.post("/v1/chat/completions", json=prompt.body(model, max_tokens))
            response.raise_for_status()
            reply = response.json()
            text = reply["choices"][0]["message"]["content"] or ""
            answer = Answer(prompt, time.monotonic() - started, reply["usage"]["completion_tokens"], text)
            block.answers.append(answer)
            finished(answer)

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))
    block.seconds = time.monotonic() - started
    return block
