"""Calls of a multi-token-prediction layer as graphs: they draft what plain calls do, and nothing else is launched."""

from copy import copy
from typing import Any

import pytest
import torch
from helpers.mtp import checkpoint, with_predictor
from helpers.simulated_gpu import Times, ask, simulate
from helpers.tape import record
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE, PackedBatch
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.calls import captured_size
from jet_export.runtime.capacity import Serving
from jet_export.runtime.graphs import GraphCache
from jet_export.runtime.mtp_calls import MtpCalls, feed_sizes
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.tokenizer import ByteTokenizer

MOST = 3  # drafted tokens
LIMITS = Limits(max_batch_size=3, max_seq_len=2 * PAGE, prefill_chunk=48)
SERVINGS = [{}, {"deterministic": True}, {"prefix_cache_bytes": 1 << 24}, {"kv_tokens": 5 * PAGE}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> JetNemotronForCausalLM:
    return with_predictor(checkpoint(tmp_path_factory.mktemp("mtp")))


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are captured on the CPU."""

    def capture(cache: GraphCache, call: Any, overlap: bool = False) -> Any:
        cache.captures += 1
        return record(call)

    monkeypatch.setattr(GraphCache, "capture", capture)


def batching(model: JetNemotronForCausalLM, speculate: str = "mtp", **serving: Any) -> BatchingEngine:
    engine = EagerEngine(model, LIMITS, rollback=MOST + 1)
    options = Serving(**{"prefix_cache_bytes": 0, **serving}, speculate=speculate)
    one = BatchingEngine(engine, ByteTokenizer(), -1, options)
    if one.speculation:
        one.speculation.lengths.fixed = True  # drafts are as long as they may be, whatever they cost
    return one


def calls_of(one: BatchingEngine) -> MtpCalls:
    assert one.mtp is not None
    return one.mtp.calls


def captured(one: BatchingEngine, all_calls: bool = False) -> BatchingEngine:
    """With the layer's calls captured, or all of them."""
    calls = calls_of(one)
    calls.runner = one.runner if all_calls else copy(one.runner)
    calls.runner.cuda_graphs = True
    return one


def answers(one: BatchingEngine) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Of six requests, of which at most three run at once, and whose prompts begin alike; and the drafts of each
    step."""
    drafted: list[list[list[int]]] = []
    if one.speculation:
        draft = one.speculation.proposer.draft

        def recording(*given: Any) -> list[list[int]]:
            drafted.append(draft(*given))
            return drafted[-1]

        one.speculation.proposer.draft = recording  # type: ignore[method-assign, assignment]
    prompts = [[7 * i % 90 for i in range(n)] for n in (122, 121, 123, 1, 20, 124)]
    asked = [
        one.submit(prompt, Params(14, Sampling(temperature=i % 2, seed=i)), lambda output: None)
        for i, prompt in enumerate(prompts)
    ]
    while one.step():
        pass
    return [list(s.tokens) for s in asked], drafted


@pytest.mark.parametrize("serving", SERVINGS, ids=str)
def test_replayed_calls_draft_what_plain_ones_do(model, tapes, serving: dict[str, Any]) -> None:
    """Ragged, greedy and sampled, behind a cached prefix, and of requests that were preempted."""
    one, plain = captured(batching(model, **serving)), batching(model, **serving)
    calls_of(one).capture()
    ready = one.runner.graphs.captures
    got, want = answers(one), answers(plain)
    assert got == want and got[0] == answers(batching(model, "off", **serving))[0]
    assert sum(len(d) for step in got[1] for d in step) > 40
    calls = calls_of(one)
    assert one.runner.graphs.captures == ready == len(calls.feeds) + len(calls.steps)
    for graphs in (calls.feeds, calls.steps):
        assert sum(g.graph.replays for g in graphs.values()) > 10  # type: ignore[attr-defined]
    assert len(calls.feeds) == 1 and set(calls.steps) == ({1} if "deterministic" in serving else {1, 2, 3})
    if "kv_tokens" in serving:
        assert one.scheduler.memory.counts.preemptions
    if "prefix_cache_bytes" in serving:
        assert one.scheduler.memory.counts.hits


def test_a_call_that_is_captured_between_the_steps_of_a_draft_leaves_them_as_they_were(model, tapes) -> None:
    """As without `prepare`; and beside the engine's other captured calls."""
    one = captured(batching(model), all_calls=True)
    assert answers(one) == answers(batching(model))
    assert len(calls_of(one).steps) > 1 and one.runner.graphs.mixed
    assert one.executor.verify is not None and one.executor.verify.graphs


@pytest.mark.parametrize("prepared", [True, False])
def test_a_prepared_engine_drafts_by_graphs_alone(monkeypatch: pytest.MonkeyPatch, prepared: bool) -> None:
    """But for prompts; and steps in which graphs are captured say nothing of what a draft takes."""
    times, seconds = Times(plain=lambda rows: 1e-3, verify=lambda tokens: 1e-3), list[float]()
    one, gpu = simulate(monkeypatch, times, 6, fixed=True, speculate="mtp")
    if prepared:
        one.prepare()
    gpu.calls.clear()
    assert one.speculation is not None
    monkeypatch.setattr(one.speculation.lengths, "observe", lambda *given: seconds.append(given[2]))
    ask(one, gpu, 80)
    while one.step():
        pass
    drafts = one.metrics.drafts
    assert drafts is not None and len(drafts.drafted) == 4 and drafts.drafted == drafts.accepted
    assert gpu.calls["predict", "replay"] > 40 and gpu.calls["predict", "direct"] == 1
    assert bool(gpu.calls["predict", "capture"]) != prepared
    assert len(seconds) > 8 and max(seconds) < times.capture


def test_a_row_with_no_steps_to_go_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have no room for a token more."""
    one, _ = simulate(monkeypatch, Times(plain=lambda rows: 1.0, verify=lambda tokens: 1.0), 6, speculate="mtp")
    calls, seen, predict = calls_of(one), [], one.engine.predict

    def watched(ids: Tensor, hidden: Tensor, batch: PackedBatch, *rest: Any) -> Any:
        seen.append((batch.slots.tolist(), batch.context_lens.tolist()))
        return predict(ids, hidden, batch, *rest)

    monkeypatch.setattr(one.engine, "predict", watched)
    calls.capture()
    assert all(slot == -1 for slots, _ in seen for slot in slots)
    seen.clear()
    calls.begin([2, 0, 5, 3], [10, 20, 30, 40], [3, 2, 2, 1])
    for n in (4, 3, 1):
        calls.step(torch.ones(n, dtype=torch.int64))
    (first, held), (second, held_then), last = seen
    assert (first, held) == ([2, 0, 5, 3], [10, 20, 30, 40])
    assert second == [2, 0, 5, -1] and held_then[:3] == [11, 21, 31]
    assert last == ([2], [12])


@pytest.mark.parametrize("most", [2, 5, 16])
def test_all_accepted_pairs_fit_one_of_a_few_sizes(most: int) -> None:
    limits = Limits(max_batch_size=64, max_seq_len=1024, prefill_chunk=256)
    sizes = feed_sizes(64, most, limits)
    assert sizes == sorted(sizes, key=lambda size: (-size.tokens, -size.sequences)) and len(sizes) <= 20 + 6 * most
    for n in range(1, 65):
        assert {captured_size(pairs, n, limits) for pairs in range(n, n * most + 1)} <= set(sizes)
    assert len(feed_sizes(1, most, limits)) == 1  # of batch-invariant drafts
