"""Rows of packed documents, and batches of them.

A document's tokens [t_0 ... t_n, eos] give inputs t_0 ... t_n, eos and labels t_1 ... eos, -100. Documents follow each
other in a row of L tokens; one that does not fit goes on in the next row as a sequence of its own. Nothing but the data
crosses from one sequence to another: states begin at zero, attention sees its own sequence only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """L tokens: of which sequences, and what comes next."""

    tokens: Sequence[int]
    labels: Sequence[int]
    lengths: Sequence[int]  # of the sequences; they add up to L


@dataclass(frozen=True)
class Batch:
    """R rows of L tokens, T = R * L in all."""

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, IGNORED where nothing follows
    cu_seqlens: Tensor  # [N+1] int32
    rows: int
    targets: int  # labels that are not IGNORED
    masks: dict[int, Any] = field(default_factory=dict)  # of attention, by window: packed_attention's, made once

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
        lengths = torch.tensor([0, *(n for row in rows for n in row.lengths)], dtype=torch.int32)
        return cls(
            tokens=_joined(row.tokens for row in rows).to(device, non_blocking=True),
            labels=_joined(row.labels for row in rows).to(device, non_blocking=True),
            cu_seqlens=lengths.cumsum(0, dtype=torch.int32).to(device, non_blocking=True),
            rows=len(rows),
            targets=targets_of(rows),
        )

    @property
    def length(self) -> int:
        """L, the tokens of a row."""
        return len(self.tokens) // self.rows

    @cached_property
    def segments(self) -> Tensor:
        """[T] int64: the sequence of each token."""
        at = torch.arange(len(self.tokens), device=self.tokens.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens, at, right=True) - 1

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64: the token's place in its sequence."""
        at = torch.arange(len(self.tokens), device=self.tokens.device)
        return at - self.cu_seqlens.long()[self.segments]


def _joined(rows: Iterable[Sequence[int]]) -> Tensor:
    """[T] int64. Arrays are copied, lists read number by number."""
    return torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))


def targets_of(rows: Sequence[Row]) -> int:
    """How many tokens of these rows have a next token to predict."""
    return sum(int(np.count_nonzero(np.asarray(row.labels) != IGNORED)) for row in rows)


class Packer:
    """Documents in, rows out. Its state is what is left of the last document."""

    def __init__(self, length: int, left: dict[str, list[int]] | None = None) -> None:
        left = left or {"tokens": [], "labels": [], "lengths": []}
        self.length = length
        self.tokens, self.labels, self.lengths = (list(left[k]) for k in ("tokens", "labels", "lengths"))

    @property
    def left(self) -> dict[str, list[int]]:
        return {"tokens": list(self.tokens), "labels": list(self.labels), "lengths": list(self.lengths)}

    @property
    def full(self) -> bool:
        return len(self.tokens) >= self.length

    def add(self, document: list[int]) -> None:
        """Tokens of a document, two of them or more: one alone has nothing to predict, and is left out."""
        if len(document) > 1:
            self.tokens += document
            self.labels += [*document[1:], IGNORED]
            self.lengths.append(len(document))

    def take(self) -> Row:
        """The first `length` tokens."""
        n, lengths, room = self.length, [], self.length
        while room:
            here = min(room, self.lengths[0])
            lengths.append(here)
            room -= here
            self.lengths[0] -= here
            if not self.lengths[0]:
                self.lengths.pop(0)
        row = Row(array("q", self.tokens[:n]), array("q", self.labels[:n]), lengths)
        del self.tokens[:n], self.labels[:n]
        return row
