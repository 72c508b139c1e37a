"""The capacity of an engine: sequences at once, KV pages, caches and tokens per step, within its limits and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import available_memory, workspace_per_token
from jet_export.model.cache import PAGE, StateSpec, cdiv, pages_per_sequence
from jet_export.model.config import JetNemotronConfig
from jet_export.runtime.copies import WORD, row_words
from jet_export.runtime.pacing import Pacing
from jet_export.runtime.plan import Capacity
from jet_export.runtime.runner import PoolSize
from jet_export.utils.errors import JetExportError

INTERVAL = 256  # tokens: prefixes inside a prompt are cached at most this often, after whole chunks
SHARE = 10  # the caches take 1/10 of the free memory by default, on the device and on the host
ENTRIES = 16  # default prefix cache entries a slot, at most
HOST_BYTES = 4 << 30  # default host memory, at most: it is pinned when the engine starts


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Serving options. None: the bundle's limits, or as much of them as fits in memory."""

    slots: int | None = None  # sequences at once, at most the bundle's max_batch_size
    kv_tokens: int | None = None  # room in the KV cache of full attention, in tokens of all sequences
    token_budget: int | None = None  # tokens per step, decode and prefill
    max_waiting: int = 256  # requests in the queue
    wait_timeout: float = 60.0  # seconds in the queue
    deterministic: bool = False  # batch-invariant: a request's bits do not depend on the others; slower
    mixed_prefill: int | None = None  # prompt tokens of a step that also decodes; None: by pacing.py on a GPU, else all
    tpot_ms: float | None = None  # milliseconds of a step that decodes, which bound its prompt tokens; None: no bound
    prefix_cache_bytes: int | None = None  # device memory for states of cached prefixes; None: a share; 0: no cache
    host_cache_bytes: int | None = None  # host memory for preempted requests and evicted prefixes; None: a share
    speculate: str = (
        "off"  # "lookup", by prompt lookup, or "mtp", by a layer of the bundle: draft tokens, and verify them
    )
    draft: str | None = None  # a bundle that drafts them
    drafts: int | None = None  # tokens of a draft, at most; None: as many as the bundle verifies


class EngineShape(Protocol):
    """What the capacity depends on of an engine, or of one that is only planned."""

    @property
    def config(self) -> JetNemotronConfig: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def specs(self) -> list[StateSpec]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def capacity(engine: EngineShape, serving: Serving, available: int | None = None) -> Capacity:
    """The capacity for `serving`. `available`: bytes of the device that states and activations may take; None: what is
    free on it now. Raises JetExportError where it exceeds the engine's limits."""
    limits = engine.limits
    if serving.slots is not None and not 1 <= serving.slots <= limits.max_batch_size:
        raise JetExportError(
            f"{serving.slots} sequences at once; the bundle's max_batch_size is {limits.max_batch_size}."
        )
    if serving.kv_tokens is not None and serving.kv_tokens < 1:
        raise JetExportError(f"kv_tokens is {serving.kv_tokens}.", "It must be at least 1.")
    pages = None if serving.kv_tokens is None else cdiv(serving.kv_tokens, PAGE)
    row_bytes = WORD * row_words(engine.specs, engine.config)
    room = _room(engine, available)
    rows = _prefix_rows(engine, serving, row_bytes, room)
    slots, total = fit_to_memory(engine, slots=serving.slots, pages=pages, room=room - rows * row_bytes)
    chunk, budget = _chunk_and_budget(engine, serving, slots)
    full, ring = pages_per_sequence(engine.config, limits.max_seq_len, chunk)
    interval = chunk * cdiv(INTERVAL, max(1, chunk))
    if serving.deterministic and interval + 2 > limits.max_seq_len:
        if serving.prefix_cache_bytes:
            raise JetExportError(
                f"prefix_cache_bytes: deterministic prefixes are kept every {interval} tokens (whole chunks of "
                f"{chunk}), but no prompt is that long: max_seq_len is {limits.max_seq_len}.",
                "Leave it out.",
            )
        rows = 0
    page_bytes = sum(s.row_bytes for s in engine.specs if s.rows == "pages")
    return Capacity(
        slots=slots,
        pages=total,
        window_pages=slots * ring,
        page_size=PAGE,
        ring_pages=ring,
        max_seq_len=limits.max_seq_len,
        prefill_chunk=chunk,
        token_budget=budget,
        max_waiting=serving.max_waiting,
        wait_timeout=serving.wait_timeout,
        whole_chunks=serving.deterministic,
        prefix_interval=interval if rows else 0,
        prefix_rows=rows,
        row_bytes=row_bytes,
        page_bytes=page_bytes,
        host_bytes=_host_bytes(
            engine,
            serving,
            preempted=slots * (row_bytes + full * page_bytes) if total < slots * full else 0,
            prefixes=bool(rows),
        ),
        mixed_prefill=serving.mixed_prefill,
    )


def pool_size(c: Capacity) -> PoolSize:
    """The runner's pools."""
    return PoolSize(
        slots=c.slots,
        pages=c.pages,
        window_pages=c.window_pages,
        table_pages=cdiv(c.max_seq_len, c.page_size),
        ring_pages=c.ring_pages,
    )


def fit_to_memory(
    engine: EngineShape, *, slots: int | None = None, pages: int | None = None, room: int | None = None
) -> tuple[int, int]:
    """(sequences at once, KV pages of full attention for all of them), of which the given ones stay as they are.

    The limits decide, if memory allows; otherwise as many sequences as leave room for one of full length, and pages in
    the rest of the memory. At least one sequence and its pages. `room`: bytes for states; None: all that is left.
    """
    limits, config = engine.limits, engine.config
    full, ring = pages_per_sequence(config, limits.max_seq_len, limits.prefill_chunk)  # of one sequence
    size = {"slots": 0, "pages": 0, "window_pages": 0}
    for spec in engine.specs:
        size[spec.rows] += spec.row_bytes
    slot_bytes = size["slots"] + ring * size["window_pages"]
    room = _room(engine) if room is None else room
    if slots is None:
        slots = limits.max_batch_size
        if slots * slot_bytes + (pages or full) * size["pages"] > room:
            slots = max(1, (room - (pages or full) * size["pages"]) // slot_bytes)
    if pages is None:
        pages = slots * full
        if slots * slot_bytes + pages * size["pages"] > room and size["pages"]:
            pages = max(full, (room - slots * slot_bytes) // size["pages"])
    return slots, pages


def _room(engine: EngineShape, available: int | None = None) -> int:
    """Bytes of the device that are left for states, beside the activations of a step."""
    available = available_memory(engine.device) if available is None else available
    return available - engine.limits.max_prefill_tokens * workspace_per_token(engine.config, engine.dtype)


def _prefix_rows(engine: EngineShape, serving: Serving, row_bytes: int, room: int) -> int:
    """Entries that the prefix cache has room for on the device."""
    asked, most = serving.prefix_cache_bytes, ENTRIES * (serving.slots or engine.limits.max_batch_size)
    if asked is not None and asked < 0:
        raise JetExportError(f"prefix_cache_bytes is {asked}.", "0 keeps no prefixes.")
    if not row_bytes:  # full attention alone: only KV pages, which are there anyway
        return 0 if asked == 0 else most
    if asked is None:
        return max(0, min(most, room // SHARE // row_bytes))
    if 0 < asked < row_bytes:
        raise JetExportError(
            f"prefix_cache_bytes is {asked}; the states of one prefix take {row_bytes} bytes.",
            f"Give at least {row_bytes}, or 0 for no prefix cache.",
        )
    return asked // row_bytes


def _host_bytes(engine: EngineShape, serving: Serving, *, preempted: int, prefixes: bool) -> int:
    """Host memory, at most what `preempted` requests need where prefixes would only move within the same memory."""
    if serving.host_cache_bytes is not None:
        if serving.host_cache_bytes < 0:
            raise JetExportError(f"host_cache_bytes is {serving.host_cache_bytes}.", "0 keeps nothing on the host.")
        return serving.host_cache_bytes // WORD * WORD
    useful = HOST_BYTES if prefixes and engine.device.type == "cuda" else preempted
    return min(useful, HOST_BYTES, available_memory(torch.device("cpu")) // SHARE) // WORD * WORD


def pacing(engine: EngineShape, serving: Serving) -> Pacing | None:
    """What chooses the prompt tokens of a step that also decodes; None: `mixed_prefill`, or all that the budget leaves.

    Raises JetExportError for options that contradict each other."""
    if serving.mixed_prefill is not None and serving.mixed_prefill < 1:
        raise JetExportError(f"mixed_prefill is {serving.mixed_prefill}.", "It must be at least 1.")
    if serving.tpot_ms is not None and not serving.tpot_ms > 0:
        raise JetExportError(f"tpot_ms is {serving.tpot_ms}.", "It must be above 0.")
    if serving.tpot_ms is not None and serving.mixed_prefill is not None:
        raise JetExportError("mixed_prefill and tpot_ms bound the same thing.", "Give one of them.")
    if serving.deterministic:
        if serving.tpot_ms is not None or serving.mixed_prefill is not None:
            raise JetExportError(
                "mixed_prefill and tpot_ms need prompts in parts of any length.",
                "Leave them out: deterministic runs whole chunks.",
            )
        return None
    automatic = serving.mixed_prefill is None and engine.device.type == "cuda"
    return Pacing(serving.tpot_ms) if automatic or serving.tpot_ms is not None else None


def _chunk_and_budget(engine: EngineShape, serving: Serving, slots: int) -> tuple[int, int]:
    """(prefill chunk, token budget): the most tokens per step of one prompt, and of everything."""
    limits = engine.limits
    max_budget = max(slots, limits.max_prefill_tokens)
    default = 512 if engine.device.type == "cpu" else 2048
    asked = serving.token_budget
    if asked is not None and asked > max_budget:
        raise JetExportError(f"token_budget {asked} is more than the {max_budget} tokens that the bundle runs at once.")
    if serving.deterministic:  # chunks must not shrink when others decode: decode gets a budget of its own
        chunk = limits.prefill_chunk if asked is None else min(limits.prefill_chunk, asked)
        return chunk, chunk + slots
    if asked is None:  # a chunk fits beside decode, so that the length of chunks does not depend on decode
        chunk = min(limits.prefill_chunk, default)
        return chunk, min(max_budget, chunk + slots)
    return min(limits.prefill_chunk, asked), asked
