"""A pretend engine: random request histories as rows, and the trajectories they should give."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from aurora_vllm.transport.rows import META_WORDS, Field, RowFlag, RowLayout

LAYOUT = RowLayout(hidden_size=2, num_aux=3, dtype=torch.float32)
KEEP = RowFlag.NONE


Row = list[int]  # the sixteen words of a row; ``pack`` adds the payload, which follows from them


def payload(request: int, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Numbers that name the row they belong to. int64 [n] -> float32 [n, 4 * H]"""
    return (request % 97 * 1000 + positions * 10 + tokens / 64).float().unsqueeze(1) + torch.arange(8.0)


def row(request: int, position: int, token: int, step: int, flags: RowFlag = KEEP, **words: int) -> Row:
    """One row. ``words`` are Field names in lower case."""
    meta = [0] * META_WORDS
    meta[Field.REQUEST_LOW], meta[Field.REQUEST_HIGH] = request & 0x7FFFFFFF, request >> 31
    meta[Field.FLAGS], meta[Field.POSITION], meta[Field.TOKEN], meta[Field.STEP] = int(flags), position, token, step
    meta[Field.EMITTED], meta[Field.DRAFT_INDEX] = -1, -1
    for name, value in words.items():
        meta[Field[name.upper()]] = value
    return meta


def pack(rows: list[Row]) -> torch.Tensor:
    """As the ring hands them out. -> uint8 [n, row_bytes]"""
    packed = torch.zeros(len(rows), LAYOUT.row_bytes, dtype=torch.uint8)
    if rows:
        meta = torch.tensor(rows, dtype=torch.int32)
        LAYOUT.meta(packed).copy_(meta)
        request = meta[:, Field.REQUEST_LOW].long() + (meta[:, Field.REQUEST_HIGH].long() << 31)
        values = (request % 97 * 1000 + meta[:, Field.POSITION] * 10 + meta[:, Field.TOKEN] / 64).float()
        values = values.unsqueeze(1) + torch.arange(8.0)
        LAYOUT.aux(packed).copy_(values[:, :6])
        LAYOUT.last(packed).copy_(values[:, 6:])
    return packed


@dataclass
class Request:
    """One request's life. ``tokens`` are the prompt and, one by one, what the target says."""

    number: int
    tokens: list[int]
    prompt_length: int
    start: int  # of the first row: prefix-cache hit below this position
    rng: random.Random
    computed: int = -1  # positions the engine has computed
    path_end: int = -1  # positions ever computed
    branches: list[tuple[int, int, list[int]]] = field(default_factory=list)  # position, accepted before it, tokens
    ended: bool = False

    def __post_init__(self) -> None:
        self.computed = self.path_end = self.start

    def step(self, step: int) -> list[Row]:
        """Rows of one engine step."""
        if self.path_end == self.start:  # nothing sent yet: the path begins wherever the engine begins now
            self.start = self.path_end = self.computed
        known = len(self.tokens)
        words = {"prompt_length": self.prompt_length, "draft_version": 1 + step // 8, "temperature_milli": 700}
        if known - self.computed > 1:  # prefill, or prefill again after a preemption
            upto = min(known, self.computed + self.rng.randint(1, 5))
            rows = [row(self.number, p, self.tokens[p], step, **words) for p in range(self.computed, upto)]
            if upto == known:
                self.tokens.append(self.rng.randrange(60))
                rows[-1] = row(self.number, upto - 1, self.tokens[upto - 1], step, emitted=self.tokens[-1], **words)
            self.computed = upto
        else:
            rows = self._decode(step, words)
        self.path_end = max(self.path_end, self.computed)
        return rows

    def _decode(self, step: int, words: dict[str, int]) -> list[Row]:
        first = self.computed
        drafts = self.rng.randint(0, 3)
        accepted = self.rng.randint(0, drafts)
        self.tokens += [self.rng.randrange(60) for _ in range(accepted + 1)]
        rows = []
        for i in range(accepted + 1):
            p = first + i
            rows.append(
                row(self.number, p, self.tokens[p], step, emitted=self.tokens[p + 1], draft_index=i - 1, **words)
            )
        self.computed = first + accepted + 1
        if drafts > accepted:  # the first of them is not what the target said, the rest is anything
            wrong = [
                (self.tokens[self.computed] + 1) % 61,
                *(self.rng.randrange(60) for _ in range(drafts - accepted - 1)),
            ]
            self.branches.append((self.computed, accepted, wrong))
            for i, token in enumerate(wrong):
                rows.append(
                    row(
                        self.number, self.computed + i, token, step, RowFlag.REJECTED, draft_index=accepted + i, **words
                    )
                )
        return rows

    def preempt(self) -> None:
        self.computed = self.rng.randint(0, self.computed)

    def end(self, step: int, dropped: bool = False) -> Row:
        self.ended = True
        return row(self.number, 0, 0, step, RowFlag.END | (RowFlag.DROPPED if dropped else KEEP))


def new_request(number: int, rng: random.Random) -> Request:
    prompt_length = rng.randint(1, 12)
    start = rng.choice([0, 0, rng.randrange(prompt_length)])
    return Request(number, [rng.randrange(60) for _ in range(prompt_length)], prompt_length, start, rng)


def engine(requests: list[Request], rng: random.Random, steps: int) -> Iterator[tuple[Request, list[Row], str]]:
    """Runs the requests mixed. Yields (request, rows, "" or "end" or "dropped")."""
    for step in range(1, steps + 1):
        running = [one for one in requests if not one.ended]
        for one in rng.sample(running, rng.randint(0, len(running))):
            event = rng.random()
            if event < 0.05:
                yield one, [one.end(step)], "end"
            elif event < 0.07:
                yield one, [one.end(step, dropped=True)], "dropped"
            else:
                if event < 0.15:
                    one.preempt()
                yield one, one.step(step), ""
