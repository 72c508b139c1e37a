"""The prefix cache: a prompt starts from the longest prefix that has been run, and its logits are those of a miss."""

import dataclasses

import pytest
import torch
from helpers.batching import tokens
from helpers.eager_bundle import eager_engine, mini_config
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.model.jet_nemotron import random_model
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.copies import WORD, row_words
from jet_export.runtime.params import Params
from jet_export.runtime.prefix import Entry
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=5 * PAGE, prefill_chunk=64)
MANY = 1 << 30


@pytest.fixture(scope="module")
def engine(device):
    return eager_engine(LIMITS, device=device)


@pytest.fixture(scope="module")
def fp8(device):
    return eager_engine(LIMITS, device=device, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)


def batching(engine, overlap: bool = False, eos: int = -1, **serving) -> BatchingEngine:
    return BatchingEngine(engine, ByteTokenizer(), eos, Serving(**serving), overlap=overlap)


def run(engine: BatchingEngine, prompt: list[int], new: int = 4, **params) -> RunningSequence:
    out = engine.submit(prompt, Params(new, **params), lambda _: None, keep_logits=not engine.overlap)
    while engine.step():
        pass
    assert out.finish_reason in ("length", "stop")
    return out


def logits(s: RunningSequence) -> Tensor:
    return torch.stack(s.logits)


def row_bytes(engine) -> int:
    return WORD * row_words(engine.specs, engine.config)


def entries_of(engine: BatchingEngine) -> list[Entry]:
    assert engine.scheduler.prefixes is not None
    return list(engine.scheduler.prefixes.entries.values())


def leaves_nothing(engine: BatchingEngine) -> bool:
    s = engine.scheduler
    while s.memory.evict():
        pass
    for entry in list(s.prefixes.hosted.values()) if s.prefixes else []:
        s.memory._forget(entry)
    return s.slots.used == s.pages.used == s.window_pages.used == s.memory.host.used == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("host", [0, 1 << 24])
def test_every_turn_of_a_conversation_starts_where_the_last_one_ended(engine, overlap: bool, host: int) -> None:
    """With room for one entry on the device the others come from the host. Greedy tokens are those without a cache."""
    rows = 1 if host else 50
    cached = batching(engine, overlap, prefix_cache_bytes=rows * row_bytes(engine), host_cache_bytes=host)
    plain = batching(engine, prefix_cache_bytes=0)
    texts = [tokens(41, 1), tokens(2 * PAGE - 20, 2)]
    held = [0, 0]
    for turn in range(3):
        for i, text in enumerate(texts):
            answer = run(cached, text, 8, stop_ids=(5,))
            alone = run(plain, text, 8, stop_ids=(5,))
            assert answer.tokens == alone.tokens and answer.cached_tokens == held[i]
            if not overlap:
                assert torch.allclose(logits(answer), logits(alone), rtol=1e-3, atol=1e-4)
            texts[i] = [*text, *answer.tokens, *tokens(7, 10 + turn)]
            held[i] = answer.request.held  # all but the last token, and with overlap a stop token too
    counts = cached.metrics.memory
    assert counts.hits + counts.host_hits == 4 and (counts.host_hits > 0) == (host > 0)
    assert cached.metrics.prompt_tokens == plain.metrics.prompt_tokens - cached.metrics.prefix_tokens
    shown = cached.render_metrics()
    assert f"jet_prefix_tokens_total {counts.hit_tokens}" in shown
    assert f"jet_prefix_host_hits_total {counts.host_hits}" in shown and "jet_prefix_cache_bytes" in shown
    assert "jet_prefix_cache_bytes" not in plain.render_metrics()
    assert leaves_nothing(cached)


@pytest.mark.parametrize("end", [20, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 60])
def test_a_hit_has_the_logits_of_the_miss_wherever_it_ends(engine, fp8, end: int) -> None:
    for one, tolerance in ((engine, 1e-4), (fp8, 0.1)):
        cached, plain = batching(one, prefix_cache_bytes=MANY), batching(one, prefix_cache_bytes=0)
        text = tokens(end + 90, end)
        run(cached, text[:end])
        hit, miss = run(cached, text), run(plain, text)
        assert hit.cached_tokens == end and miss.cached_tokens == 0
        error = (logits(hit)[0] - logits(miss)[0]).norm() / logits(miss)[0].norm()
        assert error < tolerance
        assert torch.equal(logits(run(cached, text))[0], logits(run(cached, text))[0])  # from the same entry: the same


def test_entries_are_not_changed_by_those_that_use_them(engine) -> None:
    """The request that made an entry goes on writing its last page; others start from copies of it meanwhile."""
    cached, plain = batching(engine, prefix_cache_bytes=MANY), batching(engine, prefix_cache_bytes=0)
    text = tokens(PAGE + 20, 0)
    first = cached.submit(text, Params(24), lambda _: None)
    for _ in range(8):
        cached.step()
    others = [cached.submit([*text, *tokens(9, i)], Params(24), lambda _: None) for i in range(2)]
    while cached.step():
        pass
    assert all(o.cached_tokens == PAGE + 20 for o in others)
    for i, o in enumerate(others):
        assert o.tokens == run(plain, [*text, *tokens(9, i)], 24).tokens
    assert first.tokens == run(plain, text, 24).tokens


def test_the_cache_is_bounded_and_evicts_the_least_recently_used(engine) -> None:
    cached = batching(engine, prefix_cache_bytes=3 * row_bytes(engine) + 1, host_cache_bytes=0)
    a, b, c = (tokens(PAGE + 1, i) for i in range(3))
    found = []
    for prompt in (a, b, [*a, 1], c, [*a, 2], [*b, 2]):
        found.append(run(cached, prompt, 1).cached_tokens > 0)
        assert len(entries_of(cached)) <= 3
    assert found == [False, False, True, False, True, False]  # c took the place of b
    assert cached.metrics.memory.evictions == 4  # of seven entries: the last prompt made two


def test_a_model_of_full_attention_alone_has_only_pages_to_share(device) -> None:
    config = dataclasses.replace(mini_config(), layer_types=("attn",) * 2, window_size=0)
    model = random_model(config, torch.float32, device, 0, max_positions=LIMITS.max_seq_len)
    cached, plain = batching(EagerEngine(model, LIMITS)), batching(EagerEngine(model, LIMITS), prefix_cache_bytes=0)
    text = tokens(PAGE + 40, 0)
    run(cached, text[:-9])
    hit, miss = run(cached, text), run(plain, text)
    assert hit.cached_tokens == PAGE + 31 and hit.tokens == miss.tokens and leaves_nothing(cached)


def test_short_prompts_and_sessions_are_not_cached(engine) -> None:
    cached = batching(engine, prefix_cache_bytes=MANY)
    run(cached, tokens(9, 0), 2)
    cached.submit(tokens(99, 0), Params(1), lambda _: None, keep="prompt")
    while cached.step():
        pass
    assert not entries_of(cached) and cached.metrics.memory.queries == 0


def test_cancelling_around_the_first_step(engine) -> None:
    """Between admission and the first step, and after the cached prefix: nothing leaks, nothing breaks."""
    cached = batching(engine, prefix_cache_bytes=MANY)
    prompt = tokens(2 * PAGE + 30, 0)
    first = run(cached, prompt)
    held = cached.scheduler.pages.used
    for steps in (0, 1, 2):
        sequence = cached.submit(prompt, Params(4), lambda _: None)
        for _ in range(steps):
            cached.step()
        cached.cancel(sequence)
        assert cached.scheduler.pages.used == held and cached.scheduler.slots.used == 0
    assert run(cached, prompt).tokens == first.tokens and leaves_nothing(cached)


def test_impossible_sizes_are_refused(engine) -> None:
    with pytest.raises(JetExportError, match="prefix_cache_bytes is -1"):
        batching(engine, prefix_cache_bytes=-1)
    with pytest.raises(JetExportError, match=f"the states of one prefix take {row_bytes(engine)} bytes"):
        batching(engine, prefix_cache_bytes=row_bytes(engine) - 1)
    with pytest.raises(JetExportError, match="host_cache_bytes is -1"):
        batching(engine, host_cache_bytes=-1)
    short = eager_engine(Limits(max_batch_size=4, max_seq_len=200, prefill_chunk=64))
    with pytest.raises(JetExportError, match="deterministic prefixes are kept every 256 tokens"):
        batching(short, deterministic=True, prefix_cache_bytes=MANY)
    assert batching(short, deterministic=True).scheduler.prefixes is None


def test_it_is_on_by_default_and_a_share_of_memory(engine, monkeypatch) -> None:
    from jet_export.runtime import capacity as module

    c = module.capacity(engine, Serving(slots=2))
    assert c.prefix_rows == 2 * module.ENTRIES and c.row_bytes == row_bytes(engine)
    room = module._room(engine)
    total = c.row_bytes * 30
    monkeypatch.setattr(module, "_room", lambda engine, available: total)
    assert room > total and module.capacity(engine, Serving(slots=2)).prefix_rows == 3
    assert module.capacity(engine, Serving(slots=2, prefix_cache_bytes=0)).prefix_rows == 0


def test_sampled_answers_do_not_depend_on_the_cache(engine) -> None:
    cached, plain = batching(engine, prefix_cache_bytes=MANY), batching(engine, prefix_cache_bytes=0)
    text = tokens(150, 0)
    hot = {"sampling": Sampling(temperature=1.0, seed=3), "repetition_penalty": 1.2, "frequency_penalty": 0.4}
    for _ in range(2):
        answer, alone = run(cached, text, 9, **hot), run(plain, text, 9, **hot)
        assert answer.tokens == alone.tokens
        text = [*text, *answer.tokens, 1, 2]
    assert cached.metrics.prefix_hits == 1
