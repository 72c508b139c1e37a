"""Pages on demand: requests that outgrow the pool together are preempted, and have the tokens that they have alone."""

import random

import pytest
import torch
from helpers.batching import require_placeless_rows, tokens
from helpers.eager_bundle import eager_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output, Params
from jet_export.runtime.runner import Runner
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer

LIMITS = Limits(max_batch_size=4, max_seq_len=5 * PAGE, prefill_chunk=64)
PLENTY = 1 << 26


@pytest.fixture(scope="module")
def engine(device):
    return eager_engine(LIMITS, device=device)


def batching(engine, overlap: bool = False, **serving) -> BatchingEngine:
    values = {"prefix_cache_bytes": 0, **serving}
    return BatchingEngine(engine, ByteTokenizer(), -1, Serving(**values), overlap=overlap)


def hot(seed: int, new: int, **changes) -> Params:
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=seed)
    return Params(new, sampling, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, **changes)


def run(engine: BatchingEngine, asked: list[tuple[list[int], Params]], gap: int = 0) -> list[RunningSequence]:
    out = []
    for prompt, params in asked:
        out.append(engine.submit(prompt, params, lambda _: None, keep_logits=not engine.overlap))
        for _ in range(gap):
            engine.step()
    while engine.step():
        pass
    s = engine.scheduler
    assert s.slots.used == s.window_pages.used == 0 and not s.waiting and not engine.sequences
    hosted = s.prefixes.hosted.values() if s.prefixes else ()
    assert s.memory.host.used == sum(s.capacity.state_bytes(e.end) for e in hosted)
    return out


ASKED = [(tokens(PAGE - 3 * i, i), hot(i, 16) if i else Params(16)) for i in range(4)]


@pytest.fixture(scope="module", params=[False, True], ids=["", "deterministic"])
def alone(request, engine) -> tuple[bool, list[RunningSequence]]:
    """Whether it is deterministic, and each of ASKED by itself."""
    if request.param:
        require_placeless_rows(engine.model, LIMITS.max_batch_size)
    plain = batching(engine, deterministic=request.param)
    return request.param, [run(plain, [a])[0] for a in ASKED]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("host", [PLENTY, 0], ids=["kept", "recomputed"])
def test_preempted_requests_have_the_tokens_they_have_alone(engine, alone, overlap: bool, host: int) -> None:
    """Four requests that need two pages each, in five pages: one greedy, three sampled with penalties."""
    deterministic, singles = alone
    small = batching(engine, overlap, kv_tokens=5 * PAGE, host_cache_bytes=host, deterministic=deterministic)
    among = run(small, ASKED)
    counts = small.metrics.memory
    assert counts.preemptions > 0 and (counts.bytes_in > 0) == (counts.bytes_out > 0) == (host > 0)
    for a, b in zip(singles, among, strict=True):
        assert a.finish_reason == b.finish_reason == "length" and a.tokens == b.tokens
        if not overlap:
            x, y = torch.stack(a.logits), torch.stack(b.logits)
            assert torch.equal(x, y) if deterministic else torch.allclose(x, y, rtol=1e-3, atol=1e-4)
    text = small.render_metrics()
    assert (
        f"jet_preemptions_total {counts.preemptions}" in text
        and f"jet_swapped_in_bytes_total {counts.bytes_in}" in text
    )


def test_a_request_that_may_be_long_reserves_nothing(engine) -> None:
    """Four without a limit of their own run together on pages for one and a half of full length."""
    small = batching(engine, kv_tokens=8 * PAGE)
    prompt = tokens(30, 0)
    running = [small.submit(prompt, Params(5 * PAGE - 30), lambda _: None) for _ in range(4)]
    small.step()
    assert len(small.scheduler.running) == 4 and small.scheduler.pages.used == 4
    for r in running:
        small.cancel(r)
    assert small.scheduler.pages.used == 0


def test_a_session_is_preempted_and_continued(engine) -> None:
    """Two sessions cut after a prompt and after an answer, which wait for each other's pages."""
    for host in (PLENTY, 0):
        small, plain = batching(engine, kv_tokens=3 * PAGE, host_cache_bytes=host), batching(engine)
        results = []
        for one in (small, plain):
            sequences = []
            for i in range(2):
                start = one.submit(tokens(PAGE - 19, i), Params(9), lambda _: None, keep="end" if i else "prompt")
                while one.step():
                    pass
                more = [] if i else tokens(7, 3)
                sequences.append((start.snapshot, more))
            group = [one.submit(more, hot(5, 15), lambda _: None, start=start) for start, more in sequences]
            while one.step():
                pass
            results.append([s.tokens for s in group])
        assert small.metrics.memory.preemptions > 0 and results[0] == results[1]


FAMILIES = [tokens(257, i) for i in (10, 11)]
CASES = [
    (FAMILIES[i % 2][:cut] + tokens(5 + i, 100 + i), hot(i, new, stop_ids=tuple(range(stops))) if i else Params(new))
    for i, (cut, new, stops) in enumerate(
        [(120, 20, 0), (256, 12, 0), (256, 12, 9), (256, 3, 0), (10, 20, 9), (120, 20, 0)]
    )
]


@pytest.fixture(scope="module")
def answers(engine) -> list[RunningSequence]:
    """Each of CASES by itself."""
    require_placeless_rows(engine.model, LIMITS.max_batch_size)
    plain = batching(engine, deterministic=True)
    return [run(plain, [case])[0] for case in CASES]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_any_order_of_arrivals_and_cancellations_changes_no_bit(engine, answers, seed: int) -> None:
    """Deterministic, in few pages, with and without prefixes, room on the host, and overlap: each request as alone."""
    rng = random.Random(seed)
    one = batching(engine).scheduler.capacity.row_bytes
    crowd = batching(
        engine,
        overlap=rng.random() < 0.5,
        deterministic=True,
        kv_tokens=rng.choice([4, 5]) * PAGE,
        prefix_cache_bytes=rng.choice([0, one, 20 * one]),
        host_cache_bytes=rng.choice([0, 2 * one, PLENTY]),
    )
    running = []
    order = [rng.randrange(len(CASES)) for _ in range(6)]
    for i in order:
        running.append(crowd.submit(*CASES[i], lambda _: None))
        for _ in range(rng.choice([0, 1, 10])):
            crowd.step()
        if rng.random() < 0.2:
            crowd.cancel(rng.choice(running))
    run(crowd, [])
    for i, s in zip(order, running, strict=True):
        if s.finish_reason == "cancelled":
            assert s.tokens == answers[i].tokens[: len(s.tokens)]
        else:
            assert (s.tokens, s.finish_reason) == (answers[i].tokens, answers[i].finish_reason)
    while crowd.scheduler.memory.evict():
        pass
    assert crowd.scheduler.pages.used == 0


AFTER = [(PAGE - 3 * i, 16) for i in range(4)]  # (prompt tokens, new ones): preempted while they decode
INSIDE = [(PAGE - 3, PAGE + 20), (3 * PAGE - 10, 8)]  # the second while it is in its prompt


@pytest.mark.parametrize("lengths", [AFTER, INSIDE], ids=["after", "inside"])
def test_the_log_probabilities_of_a_prompt_are_delivered_once(engine, lengths) -> None:
    """To requests that are preempted too, and whose tokens are computed again."""
    asked = [(tokens(n, i), Params(new, prompt_logprobs=1)) for i, (n, new) in enumerate(lengths)]
    delivered: list[list[Output]] = [[] for _ in asked]
    slow = 2 if lengths is INSIDE else None
    small = batching(engine, overlap=True, kv_tokens=5 * PAGE, host_cache_bytes=0, mixed_prefill=slow)
    running = []
    for (prompt, params), outputs in zip(asked, delivered, strict=True):
        running.append(small.submit(prompt, params, outputs.append))
    inside = False
    while small.step():
        inside |= any(r.request.preemptions and not r.tokens for r in running)
    assert small.metrics.memory.preemptions > 0 and inside == (lengths is INSIDE)
    for (prompt, _), outputs in zip(asked, delivered, strict=True):
        runner = Runner(engine)
        parts = [runner.prefill([0], [prompt[i : i + 64]], all_logits=True) for i in range(0, len(prompt), 64)]
        expected = torch.cat(parts).log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        first, *rest = outputs
        assert [p.chosen for p in first.prompt_logprobs] == pytest.approx(expected.tolist(), abs=1e-4)
        assert not any(o.prompt_logprobs for o in rest)
