"""Trajectories, the training data: a request's accepted path with the target's states, and its rejected branches.

Made from rows by :mod:`.assembler`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Branch:
    """Rejected draft tokens: the first is a wrong continuation of the path, the others follow it.

    The verification's last certain token is at ``position - 1 - accepted``. Row n has the target's state at the
    branch's token n, after the path up to ``position - 1`` and the branch's earlier tokens.
    """

    position: int  # of the first rejected row; its parent is the path's row at position - 1
    accepted: int  # draft tokens of the same verification that were accepted
    token_ids: torch.Tensor  # int64 [R]
    last: torch.Tensor  # [R, H]


@dataclass(frozen=True)
class Trajectory:
    """The accepted path of one request (or of a piece of a long one). Row t is the token at position ``start + t``."""

    request: int
    start: int  # position of the first row; above 0 after a prefix-cache hit, or in a later piece of a long request
    token_ids: torch.Tensor  # int64 [T]
    aux: torch.Tensor  # [T, num_aux * H], the target's dtype
    last: torch.Tensor  # [T, H]
    prompt_length: int  # absolute: lower positions are the prompt
    draft_version: int  # version that proposed in the last step seen
    temperature: float
    next_token: int = -1  # what the target emitted after the last row; -1 where it is not known
    branches: list[Branch] = field(default_factory=list)

    @property
    def response_tokens(self) -> int:
        """Number of rows whose tokens the target chose."""
        return max(0, self.start + len(self.token_ids) - max(self.start, self.prompt_length))

    @property
    def response_ids(self) -> torch.Tensor:
        """These tokens. int64 [response_tokens]"""
        return self.token_ids[len(self.token_ids) - self.response_tokens :]

    @property
    def is_finite(self) -> bool:
        """Whether all states of the path are finite; any other would spoil what is learned with it."""
        return all(bool(torch.isfinite(states).all()) for states in (self.aux, self.last))

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor it holds."""
        parts: list[tuple[torch.Tensor, ...]] = [
            (self.token_ids, self.aux, self.last),
            *((b.token_ids, b.last) for b in self.branches),
        ]
        return sum(tensor.nbytes for part in parts for tensor in part)
