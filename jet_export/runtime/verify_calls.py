"""Calls that verify drafts: rows of a token and what is drafted behind it, of which all logits are wanted.

Rows are short (up to ROW tokens) and of any length. On a GPU a call is a replayed CUDA graph of one of a few sizes;
what a call leaves unused belongs to padding rows. A batch-invariant call has one size, whatever is drafted for whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from jet_export.model.cache import PackedBatch
from jet_export.runtime.calls import ALIGNED, decode_bucket, round_up
from jet_export.runtime.runner import Runner
from jet_export.runtime.transfer import upload

SMALL = 64  # tokens of a call that is rounded up to whole groups of 8
ROW = 16  # tokens of a row, at most: jet::jet_block's form VERIFY


@dataclass(frozen=True, kw_only=True)
class VerifySize:
    """What a call has room for: it is filled exactly, by padding rows."""

    tokens: int
    rows: int

    @property
    def parts(self) -> tuple[int, ...]:
        """token ids, cu_seqlens, slots, context_lens."""
        return self.tokens, self.rows + 1, self.rows, self.rows


def verify_size(tokens: int, rows: int) -> VerifySize:
    """The size of the captured call that serves so many tokens and rows.

    Tokens are rounded up by less than a quarter, those of many sequences by less than an eighth, and a batch of whole
    drafts hardly at all. The padding rows are as many as hold the most that may be left over: few sizes serve all
    calls."""
    padded = decode_bucket(rows)
    least = tokens + padded - rows  # each row that is not used has a token
    if least < SMALL:
        return VerifySize(tokens=round_up(least + 1, 8), rows=padded + 1)
    step = max(16, 1 << (least.bit_length() - 4))
    more = -(-(step - 1) // (ROW - 1))  # rows: each has a token, and room for ROW - 1 of the rounding
    return VerifySize(tokens=round_up(least, step) + more, rows=padded + more)


def invariant_size(rows: int, most: int) -> VerifySize:
    """The one size of batch-invariant calls of up to `rows` rows of up to `most` tokens: each row has a padding row
    beside it that takes what it leaves."""
    return VerifySize(tokens=rows * (most + 1), rows=2 * rows)


def verify_sizes(slots: int, most: int, least_rows: int = 1) -> list[VerifySize]:
    """The sizes of the captured calls of `least_rows` to `slots` rows, the largest first."""
    sizes: set[VerifySize] = set()
    for rows in range(least_rows, slots + 1):
        sizes.update(verify_size(tokens, rows) for tokens in range(rows, rows * most + 1))
    return sorted(sizes, key=lambda size: (-size.tokens, -size.rows))


def pack_rows(
    slots: Sequence[int],
    tokens: Sequence[Sequence[int]],  # of each row, 1 to ROW; -1 - slot: the token that the slot sampled last
    held: Sequence[int],  # tokens held by each row's sequence
    size: VerifySize,
) -> Tensor:
    """The call's integers, int32 on the host: its parts one behind the other, each at an aligned address."""
    lens = [len(t) for t in tokens]
    padding, rest = size.rows - len(lens), size.tokens - sum(lens)
    assert padding <= rest <= padding * ROW, (size, lens)
    share, more = divmod(rest, padding) if padding else (0, 0)
    lens += [share + (i < more) for i in range(padding)]
    parts = (
        list(chain(chain.from_iterable(tokens), [0] * rest)),
        list(accumulate(lens, initial=0)),
        [*slots, *[-1] * padding],
        [*held, *[0] * padding],
    )
    aligned = [[*part, *[0] * (-len(part) % ALIGNED)] for part in parts]
    return torch.tensor(list(chain.from_iterable(aligned)), dtype=torch.int32)


def split_rows(integers: Tensor, size: VerifySize) -> list[Tensor]:
    parts = torch.split(integers, [round_up(n, ALIGNED) for n in size.parts])
    return [part[:n] for part, n in zip(parts, size.parts, strict=True)]


@dataclass(kw_only=True)
class VerifyGraph:
    """A captured call."""

    graph: torch.cuda.CUDAGraph
    integers: Tensor  # of pack_rows


class VerifyCalls:
    """The verifying calls of a runner, whose slots it does not move on: how far they go depends on the draws.

    `most`: tokens of a row that the engine can take back."""

    def __init__(self, runner: Runner, most: int) -> None:
        self.runner, self.most = runner, most
        self.slots = len(runner.context_lens)
        self.invariant = invariant_size(max(runner.limits.max_batch_size, self.slots), most)
        self.graphs: dict[VerifySize, VerifyGraph] = {}
        self.logits: Tensor | None = None  # [most tokens, vocab], shared by the graphs

    def run(self, slots: list[int], drafts: list[list[int]]) -> Tensor:
        """The token that each slot sampled last, and its drafts -> logits [tokens, vocab], until the next call."""
        r = self.runner
        rows = [[-1 - slot, *draft] for slot, draft in zip(slots, drafts, strict=True)]
        total, held = sum(map(len, rows)), [r.context_lens[s] for s in slots]
        if r.deterministic:
            size = self.invariant
        else:
            size = verify_size(total, len(rows)) if r.cuda_graphs else VerifySize(tokens=total, rows=len(rows))
        integers = pack_rows(slots, rows, held, size)
        r.graphs.forget_steps()
        if not r.cuda_graphs:
            return self._call(r.to_device(integers), size)[:total]
        g = self.graphs.get(size) or self._capture(size)
        upload(integers, g.integers)
        g.graph.replay()
        assert self.logits is not None
        return self.logits[:total]

    def capture(self, least_rows: int = 1) -> None:
        """The graphs of all calls of at least so many rows."""
        if not self.runner.cuda_graphs:
            return
        for size in self._sizes(least_rows):
            if size not in self.graphs:
                self._capture(size)

    def _sizes(self, least_rows: int = 1) -> list[VerifySize]:
        return [self.invariant] if self.runner.deterministic else verify_sizes(self.slots, self.most, least_rows)

    def _call(self, integers: Tensor, size: VerifySize) -> Tensor:
        r = self.runner
        ids, cu_seqlens, slots, held = split_rows(integers, size)
        own = slots.clamp_min(0)
        batch = PackedBatch(cu_seqlens, slots, held, r.block_table[own], r.window_block_table[own])
        ids = torch.where(ids < 0, r.last_tokens[(-1 - ids).clamp_min(0)], ids)
        return r.engine.verify(ids, batch, r.states)

    def _capture(self, size: VerifySize) -> VerifyGraph:
        r = self.runner
        integers = r.to_device(pack_rows([], [], [], size))  # all rows are padding

        def call() -> Tensor:
            logits = self._call(integers, size)
            if self.logits is None:
                self.logits = logits.new_empty(self._sizes()[0].tokens, logits.shape[1])
            return self.logits[: len(logits)].copy_(logits)

        graph, _ = r.graphs.capture(call)
        self.graphs[size] = VerifyGraph(graph=graph, integers=integers)
        return self.graphs[size]
