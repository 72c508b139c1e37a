"""Calls of a multi-token-prediction layer: it is fed pairs, and goes on from their last ones, a pair a step.

What a call leaves for the next one stays on the device, in buffers at fixed addresses: the steps of a draft follow each
other without the host. On a GPU a call is a replayed CUDA graph: of a step by batch bucket, of feeding by one of a few
sizes, up to the pairs that a verifying step may accept; a longer call, as of a prompt, is launched plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE, PackedBatch, allocate_states, cdiv, mtp_spec
from jet_export.runtime.calls import ALIGNED, CallSize, captured_size, decode_bucket, pack, round_up
from jet_export.runtime.runner import Runner
from jet_export.runtime.transfer import upload


class Buffers(NamedTuple):
    """Row i is that of the draft's sequence i."""

    rows: Tensor  # [3, R] int32: slots; pairs held; steps to go, without which a row is padding
    tokens: Tensor  # [R] int64, drawn last
    hidden: Tensor  # [R, hidden], of the last call
    logits: Tensor  # [R, vocab], of the last call


@dataclass(kw_only=True)
class FeedGraph:
    """A captured feeding call, with what its replays read."""

    graph: torch.cuda.CUDAGraph
    integers: Tensor  # of `pack`
    buffers: Buffers


@dataclass(kw_only=True)
class StepGraph:
    """A captured step of one batch bucket, with what its replays read."""

    graph: torch.cuda.CUDAGraph
    cu_seqlens: Tensor  # [bucket + 1] int32
    buffers: Buffers


def feed_sizes(slots: int, most: int, limits: Limits) -> list[CallSize]:
    """The sizes of the captured feeding calls of up to `slots` sequences with up to `most` pairs each, the largest
    first."""
    sizes = {
        captured_size(pairs, n, limits) for n in range(1, slots + 1) for pairs in (*range(n, n * most, 8), n * most)
    }
    return sorted((s for s in sizes if s is not None), key=lambda size: (-size.tokens, -size.sequences))


class MtpCalls:
    """The layer's calls, and its keys and values: max_seq_len of them for each slot. `runner`: the batch's, before the
    first call."""

    runner: Runner

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.slots = engine, slots
        config, dtype, device = engine.config, engine.dtype, engine.device
        pages = cdiv(engine.limits.max_seq_len, PAGE)
        (self.kv_cache,) = allocate_states([mtp_spec(config, dtype)], {"pages": slots * pages}, device)
        self.table = torch.arange(slots * pages, dtype=torch.int32, device=device).reshape(slots, pages)
        rows = round_up(max(slots, engine.limits.max_batch_size), ALIGNED)
        self.buffers = Buffers(
            rows=torch.zeros(3, rows, dtype=torch.int32, device=device),
            tokens=torch.zeros(rows, dtype=torch.int64, device=device),
            hidden=torch.zeros(rows, config.hidden_size, dtype=dtype, device=device),
            logits=torch.zeros(rows, config.vocab_size, dtype=dtype, device=device),
        )
        self.feeds: dict[CallSize, FeedGraph] = {}
        self.steps: dict[int, StepGraph] = {}  # by bucket

    def capture(self) -> None:
        """The graphs of all calls of drafts, but of long feeding ones."""
        if self.runner.cuda_graphs:
            for size in self.sizes:
                self._feed_graph(size)
            for bucket in sorted({self._bucket(n) for n in range(self._together, 0, -1)}, reverse=True):
                self._step_graph(bucket)

    @cached_property
    def sizes(self) -> list[CallSize]:
        return feed_sizes(self._together, self.engine.rollback, self.engine.limits)

    @property
    def _together(self) -> int:
        """Sequences of a draft: a batch-invariant one is of a sequence alone, in calls of one size."""
        return 1 if self.runner.deterministic else len(self.runner.context_lens)

    def feed(self, slots: list[int], tokens: list[list[int]], held: list[int]) -> Tensor:
        """The pairs of each slot behind those held, by their tokens; their hidden states are in the runner's pages.
        Logits [len(slots), vocab] of each one's last pair, until the next call."""
        n, size = len(slots), None
        if self.runner.cuda_graphs:
            size = captured_size(sum(map(len, tokens)), n, self.engine.limits)
            size = size if size in self.sizes else None
        integers, packed = pack(slots, tokens, held, size)
        if size is None:
            self._feed(self.runner.to_device(integers), packed)
        else:
            g = self._feed_graph(size)
            upload(integers, g.integers)
            g.graph.replay()
        return self.buffers.logits[:n]

    def begin(self, slots: list[int], held: list[int], steps: list[int]) -> None:
        """Behind the feeding call, whose first rows these are: each goes on by so many steps, which descend."""
        rows = torch.zeros(3, self.buffers.rows.shape[1], dtype=torch.int32)
        rows[:, : len(slots)] = torch.tensor([slots, held, steps], dtype=torch.int32)
        upload(rows, self.buffers.rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Go on by the tokens [n] int64 drawn for the first n rows, the only ones that still have steps to go. Logits
        [n, vocab], until the next call."""
        n = len(tokens)
        self.buffers.tokens[:n].copy_(tokens)
        if self.runner.cuda_graphs:
            self._step_graph(self._bucket(n)).graph.replay()
        else:
            self._step(self._ends(n))
        return self.buffers.logits[:n]

    def _bucket(self, n: int) -> int:
        return min(decode_bucket(n), self.slots)

    def _ends(self, rows: int) -> Tensor:
        return torch.arange(rows + 1, dtype=torch.int32, device=self.engine.device)

    def _feed(self, integers: Tensor, size: CallSize) -> Tensor:
        r = self.runner
        ids, cu_seqlens, slots, held, last = size.split(integers)
        own, at = slots.clamp_min(0), torch.arange(size.tokens, dtype=torch.int32, device=slots.device)
        row = torch.bucketize(at, cu_seqlens[1:], right=True)  # [T]
        p = (held[row] + at - cu_seqlens[row]).masked_fill(slots[row] < 0, 0)
        hidden = r.states[-1][:, 0, 0][r.block_table[own[row], p // PAGE], p % PAGE]  # [T, hidden]
        table = self.table[own]
        batch = PackedBatch(cu_seqlens, slots, held, table, table)
        return self._keep(*self.engine.predict(ids.long(), hidden, batch, last, self.kv_cache))

    def _step(self, cu_seqlens: Tensor) -> Tensor:
        n, b = len(cu_seqlens) - 1, self.buffers
        slots, held, left = b.rows[:, :n]
        slots = slots.masked_fill(left <= 0, -1)
        table = self.table[slots.clamp_min(0)]
        batch = PackedBatch(cu_seqlens, slots, held, table, table)
        out = self.engine.predict(b.tokens[:n].clamp_min(0), b.hidden[:n], batch, None, self.kv_cache)
        held.add_(left > 0)
        left.sub_(1)
        return self._keep(*out)

    def _keep(self, logits: Tensor, hidden: Tensor) -> Tensor:
        self.buffers.hidden[: len(hidden)].copy_(hidden)
        return self.buffers.logits[: len(logits)].copy_(logits)

    def _feed_graph(self, size: CallSize) -> FeedGraph:
        if size not in self.feeds:
            integers = self.runner.to_device(pack([], [], [], size)[0])  # all rows are padding
            graph = self._capture(lambda: self._feed(integers, size))
            self.feeds[size] = FeedGraph(graph=graph, integers=integers, buffers=self.buffers)
        return self.feeds[size]

    def _step_graph(self, bucket: int) -> StepGraph:
        if bucket not in self.steps:
            cu_seqlens = self._ends(bucket)
            graph = self._capture(lambda: self._step(cu_seqlens))
            self.steps[bucket] = StepGraph(graph=graph, cu_seqlens=cu_seqlens, buffers=self.buffers)
        return self.steps[bucket]

    def _capture(self, call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
        """A capture runs the call: over padding alone, and in the midst of a draft, whose buffers are put back."""
        before = [x.clone() for x in self.buffers]
        self.buffers.rows.zero_()
        graph, _ = self.runner.graphs.capture(call)
        for buffer, values in zip(self.buffers, before, strict=True):
            buffer.copy_(values)
        return graph
