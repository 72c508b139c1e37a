"""Copies of one sequence's states: between its slot and pages, rows of the prefix cache, and the host's memory.

A row [row_words] has the slot's states, then the window pages that the next token attends to, in order, with room for
as many as there can be. On the host a row is followed by the KV pages of full attention, layer by layer. Everything is
copied as 64-bit words, whatever its dtype. A slot and a row are copied by one multi-tensor launch over views that are
made once. To the host a copy of the states goes by a stream of its own, so that decode does not wait for the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.model.cache import PAGE, StateSpec, cdiv
from jet_export.model.config import JetNemotronConfig
from jet_export.runtime.plan import Request
from jet_export.runtime.prefix import Entry
from jet_export.runtime.runner import Runner
from jet_export.runtime.snapshot import window_range
from jet_export.runtime.transfer import to_device

WORD = 8  # bytes of int64


def words(row_bytes: int) -> int:
    return cdiv(row_bytes, WORD)


def most_window_pages(config: JetNemotronConfig) -> int:
    """Pages that the next token of a sliding-window layer attends to, at most."""
    return (config.window_size - 2) // PAGE + 2 if config.window_size > 1 else int(config.window_size > 0)


def row_words(specs: list[StateSpec], config: JetNemotronConfig) -> int:
    """64-bit words of a row."""
    each = {"slots": 1, "window_pages": most_window_pages(config), "pages": 0}
    return sum(each[s.rows] * words(s.row_bytes) for s in specs)


class StateCopies:
    """Implements memory.Copies on a runner's pools, with `rows` rows and `host_bytes` bytes on the host."""

    def __init__(self, engine: Engine, runner: Runner, *, rows: int, host_bytes: int) -> None:
        self.config, self.runner, self.device = engine.config, runner, engine.device
        by_kind: dict[str, list[Tensor]] = {"slots": [], "window_pages": [], "pages": []}  # [rows, words] each
        for spec, pool in zip(engine.specs, runner.states, strict=True):
            by_kind[spec.rows].append(as_words(pool))
        self.pages = by_kind["pages"]
        self.page_words = [pool.shape[1] for pool in self.pages]
        self.slots = [pool.unbind() for pool in by_kind["slots"]]
        self.windows = [pool.unbind() for pool in by_kind["window_pages"]]
        per_page = [pool.shape[1] for pool in by_kind["window_pages"]]
        self.sizes = [words(pool[:1].nbytes) for pool in by_kind["slots"]]
        self.sizes += [n for n in per_page for _ in range(most_window_pages(engine.config))]
        self.row_words = sum(self.sizes)
        self.rows = torch.empty(rows, self.row_words, dtype=torch.int64, device=self.device)
        self.row_views: dict[int, tuple[Tensor, ...]] = {}
        on_gpu = self.device.type == "cuda"
        self.host = torch.empty(host_bytes // WORD, dtype=torch.int64, pin_memory=on_gpu and host_bytes > 0)
        self.outward = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def slot_to_row(self, request: Request, row: int) -> None:
        states, parts = self._pairs(request, self._row(row))
        copy_all(parts, states)

    @torch.inference_mode()
    def row_to_slot(self, row: int, request: Request, page: int | None) -> None:
        states, parts = self._pairs(request, self._row(row))
        if page is not None:
            target = request.pages[request.held // PAGE]
            states += [pool[target] for pool in self.pages]
            parts += [pool[page] for pool in self.pages]
        copy_all(states, parts)

    @torch.inference_mode()
    def slot_to_host(self, request: Request, at: int) -> bool:
        pages = request.pages[: cdiv(request.held, PAGE)]
        flat = self._flat(len(pages))
        if flat is None:
            return False
        states, parts = self._pairs(request, torch.split(flat[: self.row_words], self.sizes))
        copy_all(parts, states)
        self._out(flat, pages, at)
        return True

    @torch.inference_mode()
    def row_to_host(self, entry: Entry, at: int) -> bool:
        flat = self._flat(len(entry.pages))
        if flat is None:
            return False
        flat[: self.row_words].copy_(self.rows[entry.row])
        self._out(flat, list(entry.pages), at)
        return True

    @torch.inference_mode()
    def host_to_slot(self, at: int, request: Request) -> None:
        pages = request.pages[: cdiv(request.held, PAGE)]
        if self.outward is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.outward)
        first = at // WORD
        flat = self.host[first : first + self._length(len(pages))].to(self.device, non_blocking=True)
        states, parts = self._pairs(request, torch.split(flat[: self.row_words], self.sizes))
        copy_all(states, parts)
        if pages:
            index = to_device(torch.tensor(pages), self.device)
            for pool, part in zip(self.pages, self._page_parts(flat, len(pages)), strict=True):
                pool.index_copy_(0, index, part)

    def _row(self, row: int) -> tuple[Tensor, ...]:
        """The parts of a row."""
        if row not in self.row_views:
            self.row_views[row] = torch.split(self.rows[row], self.sizes)
        return self.row_views[row]

    def _pairs(self, request: Request, parts: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """The states of a request that holds `request.held` tokens, and the parts of a row that belong to each."""
        states, n = [pool[request.slot] for pool in self.slots], len(self.slots)
        most, ring = most_window_pages(self.config), self.runner.window_block_table.shape[1]
        mine = [part.view(x.dtype)[: len(x)] for x, part in zip(states, parts, strict=False)]
        window = [request.window_pages[j % ring] for j in window_range(self.config, request.held)]
        for i, pool in enumerate(self.windows):
            states += [pool[page] for page in window]
            mine += parts[n + i * most : n + i * most + len(window)]
        return states, mine

    def _length(self, pages: int) -> int:
        return self.row_words + pages * sum(self.page_words)

    def _flat(self, pages: int) -> Tensor | None:
        """An uninitialised row and KV pages on the device; None if it has no memory for them."""
        try:
            return torch.empty(self._length(pages), dtype=torch.int64, device=self.device)
        except torch.OutOfMemoryError:
            return None

    def _page_parts(self, flat: Tensor, pages: int) -> list[Tensor]:
        """[pages, words] for each full-attention layer."""
        parts = torch.split(flat[self.row_words :], [pages * n for n in self.page_words])
        return [part.view(pages, -1) for part in parts]

    def _out(self, flat: Tensor, pages: list[int], at: int) -> None:
        """Fill in the KV pages and copy everything to the host, from byte `at`."""
        if pages:
            index = to_device(torch.tensor(pages), self.device)
            for pool, part in zip(self.pages, self._page_parts(flat, len(pages)), strict=True):
                torch.index_select(pool, 0, index, out=part)
        host = self.host[at // WORD : at // WORD + len(flat)]
        if self.outward is None:
            host.copy_(flat)
            return
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            host.copy_(flat, non_blocking=True)
        flat.record_stream(self.outward)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """In one launch."""
    if targets:  # a model of full attention alone has no other states
        torch._foreach_copy_(targets, sources)


def as_words(pool: Tensor) -> Tensor:
    """[rows, *shape] of any dtype -> [rows, words] int64, the same memory; int32 where a row has half a word too much,
    as positions of an odd number of heads do."""
    flat = pool.view(torch.uint8).view(len(pool), -1)
    return flat.view(torch.int64 if flat.shape[1] % WORD == 0 else torch.int32)
