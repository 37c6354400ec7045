"""Nats that are added to the logits of tokens while a caption is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

BEFORE = 2  # tokens that a bonus may ask for before its own
_ANY, _NONE = -1, -2


@dataclass(frozen=True)
class TokenBonus:
    """What is left to add to the logits of S sequences; a bonus is spent once its token was written where it applies.

    Attributes:
        tokens: [S, N].
        after: [S, N, 2], the tokens that must come directly before, -1 where any may.
        nats: [S, N], 0 where there is none.
        last: [S, 2], the last tokens written, -2 before the first.
    """

    tokens: Tensor
    after: Tensor
    nats: Tensor
    last: Tensor

    @classmethod
    def of(cls, rows: Sequence[Mapping[tuple[int, ...], float]]) -> Self:
        """The bonus of S sequences from the nats of their grams: one to three tokens, of which the last is raised."""
        S, N = len(rows), max(map(len, rows), default=0)
        grams, nats = torch.full((S, N, BEFORE + 1), _ANY), torch.zeros(S, N)
        grams[..., -1] = 0
        for place, row in enumerate(rows):
            if row:
                padded = [(_ANY,) * (BEFORE + 1 - len(gram)) + gram for gram in row]
                grams[place, : len(row)], nats[place, : len(row)] = torch.tensor(padded), torch.tensor([*row.values()])
        return cls(grams[..., -1], grams[..., :-1], nats, torch.full((S, BEFORE), _NONE))

    @property
    def _applies(self) -> Tensor:
        return ((self.after == _ANY) | (self.after == self.last[:, None])).all(-1)

    def add(self, logits: Tensor) -> Tensor:
        """logits [S, V] of the next token with the bonus."""
        return logits.scatter_add(1, self.tokens, self.nats.to(logits.dtype) * self._applies)

    @torch.no_grad()
    def along(self, tokens: Tensor, vocabulary: int) -> Tensor:
        """What is added for each of the tokens [S, T] when they are written one after another: [S, T, V]."""
        left, steps = self, []
        for step in range(tokens.shape[1]):
            steps.append(left.add(self.nats.new_zeros(len(tokens), vocabulary)))
            left = left.without(tokens[:, step])
        return torch.stack(steps, dim=1)

    def without(self, written: Tensor) -> Self:
        """What is left once these tokens [S] were written."""
        spent = self._applies & (self.tokens == written[:, None])
        last = torch.cat([self.last[:, 1:], written[:, None]], dim=1)
        return type(self)(self.tokens, self.after, self.nats.masked_fill(spent, 0.0), last)

    def rows(self, rows: Tensor) -> Self:
        """The bonus of some of the sequences, in any number and order."""
        return type(self)(self.tokens[rows], self.after[rows], self.nats[rows], self.last[rows])

    def to(self, device: torch.device) -> Self:
        return type(self)(*(part.to(device) for part in (self.tokens, self.after, self.nats, self.last)))
