"""The soak script: a short run over eager engines holds; what must hold is noticed where it does not."""

import asyncio
import json
from dataclasses import asdict
from typing import Any

import pytest
from helpers.eager_bundle import eager_engine
from helpers.faults import SlotsSwapped
from helpers.scripts import load_script

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.pools import Pool
from jet_export.runtime.tokenizer import ByteTokenizer

soak = load_script("serving/soak.py")
LIMITS = Limits(max_batch_size=4, max_seq_len=160, prefill_chunk=32)


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PROMPTS", 2)


def soaked(engine: EagerEngine, requests: int, *, new: int = 4, minutes: float = 0) -> Any:
    """A round, or as many as there is time for, over an engine whose pages are too few for its sequences."""
    longest = max(soak.page_of(i, engine.limits.max_seq_len, PAGE) for i in range(soak.PROMPTS))
    pages = longest * 3 // 2 + 1
    cache = soak.CACHE if minutes else None
    serving = Serving(
        slots=4,
        kv_tokens=pages * PAGE,
        deterministic=True,
        wait_timeout=1e9,
        prefix_cache_bytes=cache,
        host_cache_bytes=2**20,
    )
    it = soak.Soak(AsyncLLM.over(BatchingEngine(engine, ByteTokenizer(), -1, serving)), seed=1)
    it.new = new
    length = soak.Length(seconds=60 * minutes, requests=requests, workers=6)
    asyncio.run(soak.run(it, length, lambda line: None))
    return it


def test_a_round_holds() -> None:
    it = soaked(eager_engine(LIMITS), 16)
    assert it.record.requests == dict.fromkeys([*it.kinds, "cancelled", "bad"], 2)
    assert it.record.rss and it.record.probe and it.record.probe_cpu and len(it.record.seconds) == 1
    assert json.loads(json.dumps(asdict(it.record)))["requests"] == it.record.requests  # a Counter is lost in asdict


@pytest.mark.slow
def test_three_minutes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PROMPTS", 6)
    monkeypatch.setattr(soak, "DRIFT", 4)  # other tests run beside this one, and not all the time
    limits = Limits(max_batch_size=4, max_seq_len=1024, prefill_chunk=128)
    it = soaked(eager_engine(limits), 16, new=40, minutes=3)
    counts = it.llm.batching.scheduler.memory.counts
    assert len(it.record.seconds) >= soak.ROUNDS  # so that memory and latency were compared
    assert counts.preemptions > 0 and counts.hits > 0 and counts.evictions > 0, counts


def test_states_of_two_sequences_that_change_places_are_noticed() -> None:
    with pytest.raises(soak.Broken, match=r"request \d gives .*, and alone"):
        soaked(SlotsSwapped(eager_engine(LIMITS)), 8)


def test_what_is_lost_or_free_twice_is_noticed() -> None:
    pool = Pool(4)
    soak.check_pool("pages", pool)
    pool.take(1)
    soak.check_pool("pages", pool)
    pool.holders[0] = 0
    with pytest.raises(soak.Broken, match="pages: 0 held and 3 free, of 4"):
        soak.check_pool("pages", pool)
    pool = Pool(4)
    pool._free[0] = pool._free[1]
    with pytest.raises(soak.Broken, match="pages: 0 held and 4 free, of 4"):
        soak.check_pool("pages", pool)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rss": [10**9 + i * 10**7 for i in range(20)]}, "memory has grown from 1,050 to 1,190 MB"),
        ({"gpu": [10**9] * 12 + [2 * 10**9]}, "GPU memory has grown"),
        ({"probe": [0.1] * 12 + [0.2] * 6}, "a request alone takes 200 ms, and 100 ms at the beginning"),
        ({"rss": [10**9] * 20, "probe": [0.1] * 20}, None),
        ({"rss": [10**9, 2 * 10**9], "probe": [0.1, 1.0]}, None),  # too few
    ],
)
def test_drift_is_noticed(values: dict[str, Any], message: str | None) -> None:
    it = soak.Soak.__new__(soak.Soak)
    it.record = soak.Record(**values)
    if message is None:
        it.check_drift()
        return
    with pytest.raises(soak.Broken, match=message):
        it.check_drift()
