"""From rows to trajectories: the accepted path of a request, and the rejected branches that hang off it.

The ring delivers rows of many requests mixed, in the order in which the engine computed them. A request's rows may be:

- chunked prefill: its prompt over many steps;
- decoding: in each step the last certain token and K draft tokens, of which the accepted ones continue the path and
  the others are a branch;
- a prefix-cache hit: the first row is at a position above 0;
- preemption: the engine computes known positions again; the path keeps the first rows;
- an end at any moment, or none at all if the worker died.

A path is contiguous in position, and each of its tokens is the one that the target emitted at the row before. Rows that
violate this make no trajectory: to learn only from what really happened is worth more than a part of a request.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch

from aurora_vllm.learner.trajectory import Branch, Trajectory
from aurora_vllm.transport.rows import Field, RowFlag, RowLayout

MIN_ROWS = 4  # with fewer there is nothing to learn: the third token is the first that a draft can propose


@dataclass
class _Open:
    """A request whose end was not seen yet, or its current piece."""

    start: int
    prompt_length: int
    rows: list[torch.Tensor] = field(default_factory=list)  # uint8 [k, row_bytes], the path
    branches: list[list[torch.Tensor]] = field(default_factory=list)  # pieces of each branch
    tokens: list[int] = field(default_factory=list)
    branch_end: tuple[int, int] = (-1, -1)  # step and next position of the newest branch
    nbytes: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Assembler:
    """Joins rows into trajectories.

    Args:
        layout: of the rows.
        max_tokens: a longer path is cut into pieces of this many rows, each a trajectory.
        max_open: the most open requests; if there are more, the one that was silent longest is discarded.
        max_open_bytes: likewise, the most bytes of rows of open requests.
        branches: whether to keep rejected branches, nearly half of all rows, which only the discard term uses.

    Attributes:
        discarded: number of discarded trajectories by reason.
        open_bytes: bytes of rows of open requests.
    """

    def __init__(
        self,
        layout: RowLayout,
        max_tokens: int = 2048,
        max_open: int = 1024,
        max_open_bytes: int = 1 << 30,
        branches: bool = True,
    ) -> None:
        self._layout = layout
        self._max_tokens = max(max_tokens, MIN_ROWS)
        self._max_open = max_open
        self._max_open_bytes = max_open_bytes
        self._branches = branches
        self._open: OrderedDict[int, _Open] = OrderedDict()  # least recently heard of first
        self._given_up: OrderedDict[int, None] = OrderedDict()  # requests whose further rows mean nothing
        self.discarded: Counter[str] = Counter()
        self.open_bytes = 0

    def feed(self, rows: torch.Tensor) -> list[Trajectory]:
        """Take rows in the order of the ring; how they are sliced into calls makes no difference.

        Args:
            rows: uint8 [n, row_bytes].

        Returns:
            Trajectories that became complete, in that order.
        """
        done: list[Trajectory] = []
        if len(rows) == 0:
            return done
        meta = self._layout.meta(rows).numpy()
        for first, last in _runs(meta):
            head = meta[first]
            request = int(head[Field.REQUEST_HIGH]) << 31 | int(head[Field.REQUEST_LOW])
            flags = RowFlag(int(head[Field.FLAGS]))
            if flags & RowFlag.END:
                done += self._close(request, dropped=bool(flags & RowFlag.DROPPED))
            elif request not in self._given_up:
                if flags & RowFlag.REJECTED:
                    self._branch(request, rows[first:last], head)
                else:
                    done += self._extend(request, rows[first:last], meta[first:last])
        self._evict()
        return done

    def _extend(self, request: int, rows: torch.Tensor, meta: np.ndarray) -> list[Trajectory]:
        """Rows of the path, contiguous in position."""
        position, prompt_length = int(meta[0, Field.POSITION]), int(meta[0, Field.PROMPT_LENGTH])
        path = self._open.get(request)
        if path is None:
            # A prompt may begin anywhere (prefix cache). If an answer does, its beginning was missed, as after a
            # restart.
            if position >= prompt_length:
                self._give_up(request, "beginning missed")
                return []
            path = self._open[request] = _Open(position, prompt_length)
        self._open.move_to_end(request)
        if position > path.end:
            self._give_up(request, "gap")
            return []
        tokens = meta[:, Field.TOKEN].tolist()
        known = path.end - position  # this many rows come again, after a preemption
        sent = tokens[max(0, path.start - position) : known]  # those of them that are in the current piece
        if sent != path.tokens[max(0, position - path.start) :][: len(sent)]:
            self._give_up(request, "rows contradict each other")
            return []
        return self._append(request, path, rows[known:], tokens[known:])

    def _append(self, request: int, path: _Open, rows: torch.Tensor, tokens: list[int]) -> list[Trajectory]:
        done: list[Trajectory] = []
        while tokens:
            room = self._max_tokens - len(path.tokens)
            path.rows.append(rows[:room].clone())  # a slice would keep all rows of this read alive
            path.tokens += tokens[:room]
            self._account(path, path.rows[-1].nbytes)
            rows, tokens = rows[room:], tokens[room:]
            if len(path.tokens) == self._max_tokens:
                done += self._finish(request, path)
                self._account(path, -path.nbytes)
                path = self._open[request] = _Open(path.end, path.prompt_length)
        return done

    def _branch(self, request: int, rows: torch.Tensor, head: np.ndarray) -> None:
        """Rejected rows of one step, contiguous in position; they may arrive in two pieces."""
        path = self._open.get(request)
        if path is None or not self._branches:
            return
        step, position = int(head[Field.STEP]), int(head[Field.POSITION])
        if path.branch_end == (step, position) and path.branches:
            path.branches[-1].append(rows.clone())
        elif path.start < position <= path.end:
            path.branches.append([rows.clone()])
        else:  # its parent belongs to an earlier piece, or was never seen
            return
        self._account(path, rows.nbytes)
        path.branch_end = (step, position + len(rows))

    def _close(self, request: int, dropped: bool) -> list[Trajectory]:
        path = self._open.pop(request, None)
        if request in self._given_up:
            del self._given_up[request]
        if path is None:
            return []
        self.open_bytes -= path.nbytes
        if dropped:
            self.discarded["dropped by the worker"] += 1
            return []
        return self._finish(request, path)

    def _finish(self, request: int, path: _Open) -> list[Trajectory]:
        length = len(path.tokens)
        if length < MIN_ROWS:
            self.discarded["too short"] += 1
            return []
        rows = torch.cat(path.rows)[:length]
        meta = self._layout.meta(rows)
        emitted = meta[:, Field.EMITTED]
        follows = meta[1:, Field.TOKEN]
        if bool(((emitted[:-1] >= 0) & (emitted[:-1] != follows)).any()):
            self.discarded["rows contradict each other"] += 1
            return []
        layout = self._layout
        branches = []
        for pieces in path.branches:
            branch = torch.cat(pieces)
            at = layout.meta(branch)
            position = int(at[0, Field.POSITION])
            if position <= path.end:
                branches.append(
                    Branch(
                        position=position,
                        accepted=int(at[0, Field.DRAFT_INDEX]),  # the first rejected draft's index is their number
                        token_ids=at[:, Field.TOKEN].long(),
                        last=layout.last(branch).clone(),
                    )
                )
        found = Trajectory(
            request=request,
            start=path.start,
            token_ids=meta[:, Field.TOKEN].long(),
            aux=layout.aux(rows).clone(),
            last=layout.last(rows).clone(),
            prompt_length=path.prompt_length,
            draft_version=int(meta[-1, Field.DRAFT_VERSION]),
            temperature=int(meta[-1, Field.TEMPERATURE_MILLI]) / 1000,
            next_token=int(emitted[-1]),
            branches=branches,
        )
        if not found.is_finite:
            self.discarded["not finite"] += 1
            return []
        return [found]

    def _account(self, path: _Open, nbytes: int) -> None:
        path.nbytes += nbytes
        self.open_bytes += nbytes

    def _give_up(self, request: int, reason: str) -> None:
        path = self._open.pop(request, None)
        if path is not None:
            self.open_bytes -= path.nbytes
        self.discarded[reason] += 1
        self._given_up[request] = None
        while len(self._given_up) > 4 * self._max_open:  # their ends were never seen
            self._given_up.popitem(last=False)

    def _evict(self) -> None:
        while self._open and (len(self._open) > self._max_open or self.open_bytes > self._max_open_bytes):
            self._give_up(next(iter(self._open)), "too much open at once")


def _runs(meta: np.ndarray) -> list[tuple[int, int]]:
    """Slices of consecutive rows with the same request, flags and (for branches) step, and ascending positions."""
    before, after = meta[:-1], meta[1:]
    same = before[:, Field.POSITION] + 1 == after[:, Field.POSITION]
    for word in (Field.REQUEST_LOW, Field.REQUEST_HIGH, Field.FLAGS):
        same &= before[:, word] == after[:, word]
    same &= (before[:, Field.STEP] == after[:, Field.STEP]) | (after[:, Field.FLAGS] == RowFlag.NONE)
    same &= (after[:, Field.FLAGS] & RowFlag.END) == 0
    cuts = np.flatnonzero(~same) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(meta)], strict=True))
