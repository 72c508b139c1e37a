"""The prefix cache: a prompt skips the prefix that it shares with an earlier one, and gets the same bits."""

import random
from typing import Any

import pytest
import torch
from helpers.eager_bundle import eager_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output, Params
from jet_export.runtime.prefix import PrefixCache
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=5 * PAGE, prefill_chunk=64)
MANY = 1 << 30
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "fp8 kv": {"dtype": torch.bfloat16, "kv_dtype": torch.float8_e4m3fn},
}


@pytest.fixture(scope="module", params=KINDS)
def engine(request, device):
    return eager_engine(LIMITS, device=device, **KINDS[request.param])


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(0, 128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def batching(engine, **serving) -> BatchingEngine:
    return BatchingEngine(engine, ByteTokenizer(), -1, Serving(**serving))


def prefixes_of(engine: BatchingEngine) -> PrefixCache:
    prefixes = engine.scheduler.prefixes
    assert prefixes is not None
    return prefixes


def run(engine: BatchingEngine, prompts: list[list[int]], gaps: list[int]) -> list[RunningSequence]:
    """Prompt i arrives gaps[i] steps after the previous one."""
    out, heard = [], list[Output]()
    for prompt, gap in zip(prompts, gaps, strict=True):
        for _ in range(gap):
            engine.step()
        out.append(engine.submit(prompt, Params(4), heard.append, keep_logits=True))
    while engine.step():
        pass
    assert all(s.finish_reason == "length" for s in out)
    return out


def same(a: RunningSequence, b: RunningSequence) -> bool:
    return a.tokens == b.tokens and torch.equal(torch.stack(a.logits), torch.stack(b.logits))


def test_a_hit_gives_the_bits_of_the_miss(engine) -> None:
    """One request at a time: the second time all but the end of the prompt comes from the cache."""
    cached, plain = batching(engine, prefix_cache_bytes=MANY), batching(engine)
    shared = tokens(2 * PAGE + 40, 0)
    prompts = [shared, shared, shared[: 2 * PAGE] + tokens(70, 1), shared[: PAGE + 9], tokens(50, 2)]
    for prompt in prompts:
        (a,), (b,) = run(cached, [prompt], [0]), run(plain, [prompt], [0])
        assert same(a, b)
    m = cached.metrics
    assert (m.prefix_queries, m.prefix_hits, m.prefix_tokens) == (4, 3, 5 * PAGE)  # one is too short for the cache
    assert m.prompt_tokens == plain.metrics.prompt_tokens - m.prefix_tokens
    text = cached.render_metrics()
    assert f"jet_prefix_tokens_total {5 * PAGE}" in text and "jet_prefix_hits_total 3" in text
    assert f"jet_prefix_cache_bytes {prefixes_of(cached).size:g}" in text
    assert "jet_prefix_cache_bytes" not in plain.render_metrics()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_other_requests_and_cache_sizes_change_no_bit(engine, seed: int) -> None:
    """Deterministic mode: families of prompts in any order, possibly a cache too small for all, against no cache."""
    rng = random.Random(seed)
    families = [tokens(3 * PAGE + 10, i) for i in (10, 11)]
    prompts = []
    for i in range(7):
        cut = rng.choice([0, 100, PAGE, 2 * PAGE + 3, 3 * PAGE])
        prompts.append(rng.choice(families)[:cut] + tokens(rng.randint(1, 90), 100 + i))
    one = sum(s.row_bytes for s in engine.specs)  # about an entry of one page
    cached = batching(engine, deterministic=True, prefix_cache_bytes=rng.choice([3 * one, MANY]), kv_tokens=9 * PAGE)
    crowd = run(cached, prompts, [rng.randint(0, 4) for _ in prompts])
    plain = batching(engine, deterministic=True)
    for prompt, among in zip(prompts, crowd, strict=True):
        (alone,) = run(plain, [prompt], [0])
        assert same(among, alone)
    prefixes = prefixes_of(cached)
    assert prefixes.size <= prefixes.max_bytes
    assert cached.scheduler.pages.used == len(prefixes.held)
    while prefixes.evict():
        pass
    assert cached.scheduler.pages.used == prefixes.size == 0


def test_the_cache_is_bounded_and_evicts_the_least_recently_used(engine) -> None:
    probe = batching(engine, prefix_cache_bytes=MANY)
    run(probe, [tokens(PAGE + 1, 0)], [0])
    one = prefixes_of(probe).size
    cached = batching(engine, prefix_cache_bytes=2 * one)
    a, b, c = (tokens(PAGE + 1, i) for i in range(3))
    for prompt in (a, b, a, c, a, b):
        run(cached, [prompt], [0])
        assert prefixes_of(cached).size <= 2 * one
    assert cached.metrics.prefix_hits == 2 and prefixes_of(cached).evictions == 2  # a twice; c, then b's last
    too_small = batching(engine, prefix_cache_bytes=one - 1)
    run(too_small, [a], [0])
    assert not prefixes_of(too_small).entries


def test_cancelling_around_the_first_step(engine) -> None:
    """Between admission and the first step, and after the cached prefix: nothing leaks, nothing breaks."""
    cached = batching(engine, prefix_cache_bytes=MANY)
    prompt = tokens(2 * PAGE + 30, 0)
    (first,) = run(cached, [prompt], [0])
    held = cached.scheduler.pages.used
    for steps in (0, 1, 2):
        sequence = cached.submit(prompt, Params(4), lambda _: None)
        for _ in range(steps):
            cached.step()
        cached.cancel(sequence)
        assert cached.scheduler.pages.used == held and cached.scheduler.slots.used == 0
    (again,) = run(cached, [prompt], [0])
    assert same(first, again)


def test_impossible_sizes_are_refused(engine) -> None:
    with pytest.raises(JetExportError, match="prefix_cache_bytes is -1"):
        batching(engine, prefix_cache_bytes=-1)
    odd = eager_engine(Limits(max_batch_size=4, max_seq_len=5 * PAGE, prefill_chunk=63))
    with pytest.raises(JetExportError, match="prefixes would be kept every 8064 tokens"):
        batching(odd, prefix_cache_bytes=MANY)


def test_with_overlap_scheduling(engine) -> None:
    """As on a GPU: a sequence that has ended is decoded once more after its pages were freed."""
    shared, rng = tokens(2 * PAGE + 5, 0), random.Random(1)
    prompts = [shared[: rng.choice([PAGE, 2 * PAGE + 5])] + tokens(rng.randint(1, 60), i) for i in range(9)]
    generated = []
    for overlap in (False, True):
        batching = BatchingEngine(
            engine,
            ByteTokenizer(),
            7,
            Serving(deterministic=True, prefix_cache_bytes=MANY, kv_tokens=8 * PAGE),
            overlap=overlap,
        )
        running = []
        for i, prompt in enumerate(prompts):
            params = Params(20 + i, Sampling(temperature=2.0, seed=i))
            running.append(batching.submit(prompt, params, lambda _: None))
            batching.step()
        batching.cancel(running[3])
        while batching.step():
            pass
        assert batching.metrics.prefix_hits > 2
        assert batching.scheduler.pages.used == len(prefixes_of(batching).held)
        generated.append([s.tokens for i, s in enumerate(running) if i != 3])
    assert generated[0] == generated[1]
