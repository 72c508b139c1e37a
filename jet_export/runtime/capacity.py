"""What an engine has to give out: sequences at once, KV pages, tokens a step; within its limits and the memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jet_export.backends.base import Engine
from jet_export.bundle.limits import max_prefill_tokens
from jet_export.bundle.memory import available_memory, workspace_per_token
from jet_export.model.cache import PAGE, cdiv, pages_per_sequence
from jet_export.runtime.scheduler import Capacity
from jet_export.utils.errors import JetExportError


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How much a BatchingEngine takes on. None: the bundle's limits, or what the memory holds of them."""

    slots: int | None = None  # sequences at once, at most the bundle's max_batch_size
    kv_tokens: int | None = None  # tokens that full-attention KV has room for, all sequences together
    token_budget: int | None = None  # tokens a step, decode and prefill
    max_waiting: int = 256  # requests in the queue
    wait_timeout: float = 60.0  # seconds in the queue
    deterministic: bool = False  # a request's bits do not depend on the others; slower
    prefix_cache_bytes: int = 0  # memory for the states and KV pages of shared prompt prefixes; 0: none are kept


def capacity(engine: Engine, serving: Serving) -> Capacity:
    """What an engine has to give out. Raises JetExportError where `serving` asks for more than its limits."""
    limits = engine.limits
    if serving.slots is not None and not 1 <= serving.slots <= limits.max_batch_size:
        raise JetExportError(
            f"{serving.slots} sequences at once; the bundle's max_batch_size is {limits.max_batch_size}."
        )
    if serving.kv_tokens is not None and serving.kv_tokens < 1:
        raise JetExportError(f"kv_tokens is {serving.kv_tokens}.", "It must be at least 1.")
    pages = None if serving.kv_tokens is None else cdiv(serving.kv_tokens, PAGE)
    slots, total = what_fits(engine, serving.slots, pages)
    chunk, budget = _chunk_and_budget(engine, serving, slots)
    _, ring = pages_per_sequence(engine.config, limits.max_seq_len, chunk)
    if serving.prefix_cache_bytes < 0:
        raise JetExportError(f"prefix_cache_bytes is {serving.prefix_cache_bytes}.", "0 keeps no prefixes.")
    interval = math.lcm(chunk, PAGE) if serving.prefix_cache_bytes else 0
    if interval and interval + 2 > limits.max_seq_len:
        raise JetExportError(
            f"prefix_cache_bytes: prefixes would be kept every {interval} tokens (whole chunks of {chunk} and pages of "
            f"{PAGE}), and no prompt is longer: max_seq_len is {limits.max_seq_len}.",
            f"Set a token_budget that makes chunks shorter, or build with a --prefill-chunk that {PAGE} divides.",
        )
    page_bytes = sum(s.row_bytes for s in engine.specs if s.rows == "pages")
    return Capacity(
        slots=slots,
        pages=total,
        window_pages=min(total, slots * ring),
        page_size=PAGE,
        ring_pages=ring,
        max_seq_len=limits.max_seq_len,
        prefill_chunk=chunk,
        token_budget=budget,
        max_waiting=serving.max_waiting,
        wait_timeout=serving.wait_timeout,
        whole_chunks=serving.deterministic,
        prefix_interval=interval,
        prefix_bytes=serving.prefix_cache_bytes,
        page_bytes=page_bytes,
    )


def what_fits(engine: Engine, slots: int | None, pages: int | None) -> tuple[int, int]:
    """(sequences at once, KV pages of full attention for all of them): what is not given, by the limits, or where
    these ask for more memory than there is, as many sequences as leave room for one of full length, and the pages
    that the rest holds. At least one sequence and its pages, whatever the memory."""
    limits, config = engine.limits, engine.config
    each, ring = pages_per_sequence(config, limits.max_seq_len, limits.prefill_chunk)
    size = {"slots": 0, "pages": 0, "window_pages": 0}
    for spec in engine.specs:
        size[spec.rows] += spec.row_bytes
    a_slot = size["slots"] + ring * size["window_pages"]
    step = max_prefill_tokens(limits.max_batch_size, limits.prefill_chunk) * workspace_per_token(config, engine.dtype)
    room = available_memory(engine.device) - step
    if slots is None:
        slots = limits.max_batch_size
        if slots * a_slot + (pages or each) * size["pages"] > room:
            slots = max(1, (room - (pages or each) * size["pages"]) // a_slot)
    if pages is None:
        pages = slots * each
        if slots * a_slot + pages * size["pages"] > room and size["pages"]:
            pages = max(each, (room - slots * a_slot) // size["pages"])
    return slots, pages


def _chunk_and_budget(engine: Engine, serving: Serving, slots: int) -> tuple[int, int]:
    """(most of one prompt a step, most of everything a step), tokens."""
    limits = engine.limits
    most = max(slots, max_prefill_tokens(limits.max_batch_size, limits.prefill_chunk))
    usual = 512 if engine.device.type == "cpu" else 2048
    asked = serving.token_budget
    if asked is not None and asked > most:
        raise JetExportError(f"token_budget {asked} is more than the {most} tokens that the bundle runs at once.")
    if serving.deterministic:  # chunks do not give way to decode: the budget is theirs, and decode comes on top
        chunk = limits.prefill_chunk if asked is None else min(limits.prefill_chunk, asked)
        return chunk, chunk + slots
    if asked is None:  # a chunk fits beside decode, so that the length of chunks does not depend on it
        chunk = min(limits.prefill_chunk, usual)
        return chunk, min(most, chunk + slots)
    if serving.prefix_cache_bytes and asked - slots >= PAGE:
        return min(limits.prefill_chunk, (asked - slots) // PAGE * PAGE), asked
    return min(limits.prefill_chunk, asked), asked
