"""Runs an engine on its state pools and block tables, slot by slot; on a GPU by CUDA graphs (graphs.py)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.model.cache import PackedBatch, allocate_states, pages_per_sequence
from jet_export.runtime.calls import ALIGNED, CallSize, captured_size, decode_bucket, pack, round_up, service_sizes
from jet_export.runtime.graphs import DecodeGraph, GraphCache, MixedGraph
from jet_export.runtime.transfer import to_device, upload


def pad_rows(batch: PackedBatch, rows: int) -> PackedBatch:
    """The batch with `rows` rows of padding appended; `cu_seqlens` includes them already."""
    return PackedBatch(
        batch.cu_seqlens,
        F.pad(batch.slots, (0, rows), value=-1),
        F.pad(batch.context_lens, (0, rows)),
        F.pad(batch.block_table, (0, 0, 0, rows)),
        F.pad(batch.window_block_table, (0, 0, 0, rows)),
    )


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """Rows of the pools, and the most pages of one sequence (the widths of the block tables)."""

    slots: int
    pages: int
    window_pages: int
    table_pages: int
    ring_pages: int


class Runner:
    """Slots and their pages. `context_lens[slot]` is the number of tokens a slot holds.

    By default there are `limits.max_batch_size` slots, each with its own pages for `max_seq_len`; with `pools`, a slot
    has the pages that `assign` gives it. `deterministic` makes steps batch-invariant: decode always runs
    `max_batch_size` rows, padded, and prefill one sequence per call, so that a row's bits do not depend on the others.
    """

    def __init__(
        self, engine: Engine, cuda_graphs: bool = True, *, pools: PoolSize | None = None, deterministic: bool = False
    ) -> None:
        self.deterministic = deterministic
        self.engine, self.limits, self.device = engine, engine.limits, engine.device
        if pools is None:
            n = self.limits.max_batch_size
            pages, ring = pages_per_sequence(engine.config, self.limits.max_seq_len, self.limits.prefill_chunk)
            pools = PoolSize(slots=n, pages=n * pages, window_pages=n * ring, table_pages=pages, ring_pages=ring)
            self.block_table = self._i32(range(n * pages)).reshape(n, pages)
            self.window_block_table = self._i32(range(n * ring)).reshape(n, ring)
        else:
            n = pools.slots
            self.block_table = torch.zeros(n, pools.table_pages, dtype=torch.int32, device=self.device)
            self.window_block_table = torch.zeros(n, pools.ring_pages, dtype=torch.int32, device=self.device)
        rows = {"slots": n, "pages": pools.pages, "window_pages": pools.window_pages}
        self.states = allocate_states(engine.specs, rows, self.device)
        self.context_lens = [0] * n
        self.last_tokens = torch.zeros(n, dtype=torch.int64, device=self.device)  # what each slot decodes next
        self.cuda_graphs = cuda_graphs and self.device.type == "cuda"
        self.graphs = GraphCache(self.device)

    def capture_calls(self, token_budget: int, prompt_tokens: Callable[[int], int]) -> None:
        """Capture the graphs of the calls that serving makes, so that no request waits for one. Nothing may run yet.

        `token_budget`: tokens of a step; `prompt_tokens`: those of prompts, where so many sequences decode beside them.
        """
        if not self.cuda_graphs:
            return
        slots = len(self.context_lens)
        if not self.deterministic:
            for size in service_sizes(slots, token_budget, prompt_tokens, self.limits):
                if size not in self.graphs.mixed:
                    self._capture_mixed(size)
        for bucket in {self._bucket(n) for n in range(slots, 0, -1)} - self.graphs.decode.keys():
            self._capture(bucket)

    def reset(self, slot: int) -> None:
        """Empty a slot. Its states need no clearing: with context_lens 0 the kernels start from zero states."""
        self.context_lens[slot] = 0
        self.graphs.forget_steps()

    def hold(self, slot: int, tokens: int) -> None:
        """Record that a slot's states were written from outside and hold this many tokens."""
        self.context_lens[slot] = tokens
        self.graphs.forget_steps()

    def assign(self, slot: int, pages: list[int], window_pages: list[int]) -> None:
        """Start a new sequence in a slot, with these pages."""
        self.reset(slot)
        self.block_table[slot, : len(pages)] = self._i32(pages)
        self.window_block_table[slot, : len(window_pages)] = self._i32(window_pages)

    def extend(self, grown: list[tuple[int, list[int], int]]) -> None:
        """Running sequences have more pages: (slot, all its pages, how many of them are new)."""
        new = [(slot, i, pages[i]) for slot, pages, n in grown for i in range(len(pages) - n, len(pages))]
        if new:
            slots, columns, values = self._i32_lists(*zip(*new, strict=True))
            self.block_table[slots.long(), columns.long()] = values

    def batch(self, slots: list[int], lens: list[int]) -> PackedBatch:
        ends, held = list(accumulate(lens, initial=0)), [self.context_lens[s] for s in slots]
        cu_seqlens, rows, context_lens = self._i32_lists(ends, slots, held)
        return PackedBatch(cu_seqlens, rows, context_lens, self.block_table[rows], self.window_block_table[rows])

    def prefill(self, slots: list[int], tokens: list[list[int]], all_logits: bool = False) -> Tensor:
        """Run the next tokens of each slot, at most `prefill_chunk`; logits of each row's last token, or of all."""
        if self.deterministic and len(slots) > 1:
            return torch.cat([self.prefill([s], [t], all_logits) for s, t in zip(slots, tokens, strict=True)])
        batch = self.batch(slots, [len(t) for t in tokens])
        ids = self.to_device(torch.frombuffer(array("q", chain.from_iterable(tokens)), dtype=torch.int64))
        last = batch.cu_seqlens[1:] - 1
        rows = torch.arange(len(ids), dtype=torch.int32, device=self.device) if all_logits else last
        logits = self.engine.prefill(ids, batch, rows, self.states)
        self._advance(slots, [len(t) for t in tokens])
        self.graphs.forget_steps()
        return logits

    def mixed(self, slots: list[int], tokens: list[list[int] | None]) -> Tensor:
        """One call for prompt chunks and sequences that decode: the next tokens of each slot, None for the token that
        the slot sampled last; logits [len(slots), vocab] of each row's last token, until the next call.

        Not with `deterministic`, whose calls do not depend on what else runs."""
        lens, held = [1 if t is None else len(t) for t in tokens], [self.context_lens[s] for s in slots]
        size = captured_size(sum(lens), len(slots), self.limits) if self.cuda_graphs else None
        integers, packed = pack(slots, tokens, held, size)
        if size is None:
            logits = self._mixed_call(self.to_device(integers), packed)
        else:
            g = self.graphs.mixed.get(size) or self._capture_mixed(size)
            upload(integers, g.integers)
            g.graph.replay()
            assert self.graphs.mixed_logits is not None
            logits = self.graphs.mixed_logits[: len(slots)]
        self._advance(slots, lens)
        self.graphs.forget_steps()
        return logits

    def decode(self, slots: list[int], tokens: Tensor | None = None) -> Tensor:
        """Run one token per slot: tokens [n] int64 on the device, by default `last_tokens` -> logits [n, vocab]."""
        if self.cuda_graphs:
            logits = self._replay(slots, tokens)
        else:
            logits = self._decode(slots, self.last_tokens[self._i32(slots)] if tokens is None else tokens)
        self._advance(slots, [1] * len(slots))
        return logits

    def _decode(self, slots: list[int], tokens: Tensor) -> Tensor:
        """Without a CUDA graph; with `deterministic`, padded."""
        if not self.deterministic:
            return self.engine.decode(tokens, self.batch(slots, [1] * len(slots)), self.states)
        batch, n, bucket = self.batch(slots, [1] * len(slots)), len(slots), self._bucket(len(slots))
        rows = pad_rows(PackedBatch(self._i32(range(bucket + 1)), *batch[1:]), bucket - n)
        return self.engine.decode(F.pad(tokens, (0, bucket - n)), rows, self.states)[:n]

    def _advance(self, slots: list[int], lens: list[int]) -> None:
        for slot, n in zip(slots, lens, strict=True):
            self.context_lens[slot] += n

    def _i32(self, values: Sequence[int]) -> Tensor:
        return self.to_device(torch.tensor(values, dtype=torch.int32))

    def _i32_lists(self, *lists: Sequence[int]) -> list[Tensor]:
        """Several lists by one copy, each at an aligned address: the kernels load whole vectors."""
        padded = [[*x, *[0] * (-len(x) % ALIGNED)] for x in lists]
        parts = torch.split(self._i32([v for x in padded for v in x]), [len(x) for x in padded])
        return [part[: len(x)] for part, x in zip(parts, lists, strict=True)]

    def to_device(self, host: Tensor) -> Tensor:
        return to_device(host, self.device)

    def _bucket(self, n: int) -> int:
        if self.deterministic:
            return max(self.limits.max_batch_size, n)
        return min(decode_bucket(n), max(self.limits.max_batch_size, n))

    def _replay(self, slots: list[int], tokens: Tensor | None) -> Tensor:
        n, bucket = len(slots), self._bucket(len(slots))
        g = self.graphs.decode.get(bucket) or self._capture(bucket)
        if g.slots != slots:
            held, padding = [self.context_lens[s] for s in slots], round_up(bucket, ALIGNED) - n
            rows = [[*slots, *[-1] * padding], [*held, *[0] * padding], [*[1] * n, *[0] * padding]]
            upload(torch.tensor(rows, dtype=torch.int32), g.integers)
            g.slots = list(slots)
        self.graphs.forget_steps(but=g)
        if tokens is not None:
            self.last_tokens[g.integers[0, :n].long()] = tokens
        g.graph.replay()
        return g.logits[:n]

    def _capture(self, bucket: int) -> DecodeGraph:
        integers = torch.zeros(3, round_up(bucket, ALIGNED), dtype=torch.int32, device=self.device)
        integers[0] = -1  # all rows are padding: no state is written
        rows, held, used = integers[:, :bucket]
        cu_seqlens = torch.arange(bucket + 1, dtype=torch.int32, device=self.device)

        def step() -> Tensor:
            own = rows.clamp_min(0)
            batch = PackedBatch(cu_seqlens, rows, held, self.block_table[own], self.window_block_table[own])
            logits = self.engine.decode(self.last_tokens[own], batch, self.states)
            held.add_(used)
            return logits

        graph, logits = self.graphs.capture(step, overlap=self.engine.dependent_launch)
        self.graphs.decode[bucket] = DecodeGraph(graph=graph, cu_seqlens=cu_seqlens, integers=integers, logits=logits)
        return self.graphs.decode[bucket]

    def _mixed_call(self, integers: Tensor, size: CallSize) -> Tensor:
        ids, cu_seqlens, rows, held, outputs = size.split(integers)
        own = rows.clamp_min(0)
        batch = PackedBatch(cu_seqlens, rows, held, self.block_table[own], self.window_block_table[own])
        ids = torch.where(ids < 0, self.last_tokens[(-1 - ids).clamp_min(0)], ids)
        return self.engine.prefill(ids, batch, outputs, self.states)

    def _capture_mixed(self, size: CallSize) -> MixedGraph:
        integers = self.to_device(pack([], [], [], size)[0])  # all rows are padding

        def call() -> Tensor:
            logits = self._mixed_call(integers, size)
            if self.graphs.mixed_logits is None:
                most = max(len(self.context_lens), self.limits.max_batch_size) + ALIGNED
                self.graphs.mixed_logits = logits.new_empty(round_up(most, 64), logits.shape[1])
            return self.graphs.mixed_logits[: len(logits)].copy_(logits)

        graph, _ = self.graphs.capture(call)
        self.graphs.mixed[size] = MixedGraph(graph=graph, integers=integers)
        return self.graphs.mixed[size]
