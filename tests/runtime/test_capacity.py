"""The capacity of a BatchingEngine whose bundle's limits need more memory than is free."""

import pytest
import torch
from helpers.eager_bundle import eager_llm

from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import workspace_per_token
from jet_export.model.cache import pages_per_sequence
from jet_export.runtime import capacity as module
from jet_export.runtime.capacity import Serving, capacity, fit_to_memory

LIMITS = Limits(max_batch_size=3, max_seq_len=200, prefill_chunk=32)


@pytest.fixture(scope="module")
def llm(device):
    return eager_llm(LIMITS, device=device)


def sizes(engine) -> tuple[int, int, int, int]:
    """Pages of a sequence of full length; bytes of a page, of a slot with its windows, and of a step's activations."""
    each, ring = pages_per_sequence(engine.config, LIMITS.max_seq_len, LIMITS.prefill_chunk)
    rows = {r: sum(s.row_bytes for s in engine.specs if s.rows == r) for r in ("slots", "pages", "window_pages")}
    step = LIMITS.max_prefill_tokens * workspace_per_token(engine.config, engine.dtype)
    return each, rows["pages"], rows["slots"] + ring * rows["window_pages"], step


def test_the_limits_apply_if_memory_allows(llm) -> None:
    each, *_ = sizes(llm.engine)
    assert fit_to_memory(llm.engine) == (3, 3 * each)
    assert fit_to_memory(llm.engine, slots=2) == (2, 2 * each) and fit_to_memory(llm.engine, pages=5) == (3, 5)


def test_less_memory_means_fewer_pages_then_fewer_sequences(llm, monkeypatch) -> None:
    each, page, slot, step = sizes(llm.engine)
    for room, expected in (
        (3 * slot + 3 * each * page, (3, 3 * each)),
        (3 * slot + 3 * each * page - 1, (3, 3 * each - 1)),
        (3 * slot + each * page, (3, each)),
        (3 * slot + each * page - 1, (2, min(2 * each, each + (slot - 1) // page))),
        (slot + each * page, (1, each)),
        (0, (1, each)),
        (-(10**9), (1, each)),
    ):
        monkeypatch.setattr(module, "available_memory", lambda device, room=room: step + room)
        assert fit_to_memory(llm.engine) == expected, room


def test_explicit_options_are_honoured_whatever_the_memory(llm, monkeypatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda device: 0)
    c = capacity(llm.engine, Serving(slots=3, kv_tokens=2000))
    assert (c.slots, c.pages) == (3, -(-2000 // c.page_size))


def test_sequences_wait_for_pages_and_get_the_same_tokens(llm, device, monkeypatch) -> None:
    each, page, slot, step = sizes(llm.engine)
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 128, (150,), generator=rng).tolist() for _ in range(3)]
    for room in (3 * slot + 2 * each * page, slot + each * page):
        monkeypatch.setattr(module, "available_memory", lambda device, room=room: step + room)
        small = eager_llm(LIMITS, device=device)
        assert small.batching.scheduler.capacity.pages < 3 * each
        assert [c.token_ids for c in small.generate(rows, 20)] == [c.token_ids for c in llm.generate(rows, 20)]
