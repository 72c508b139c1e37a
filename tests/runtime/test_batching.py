"""Continuous batching over the eager engine: a request gets the same tokens as alone, whatever else runs."""

import random
import threading
from typing import Any

import pytest
import torch
from helpers.eager_bundle import eager_engine, eager_llm

from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving, capacity
from jet_export.runtime.graphs import DecodeGraph
from jet_export.runtime.params import Output, Params
from jet_export.runtime.runner import Runner
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.scheduler import QueueFull
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=300, prefill_chunk=64)


@pytest.fixture(scope="module")
def llm(device):
    return eager_llm(LIMITS, device=device)


@pytest.fixture(autouse=True, params=[False, True], ids=["", "overlap"])
def overlap(request, monkeypatch) -> bool:
    """Everything holds with overlap scheduling too, the default on a GPU."""
    monkeypatch.setattr(f"{__name__}.OVERLAP", request.param)
    return request.param


OVERLAP = False


def batching(llm, eos: int = -1, **serving) -> BatchingEngine:
    values = {"token_budget": 48, "kv_tokens": 5 * PAGE, "prefix_cache_bytes": 0, **serving}
    return BatchingEngine(llm.engine, llm.tokenizer, eos, Serving(**values), overlap=OVERLAP)


def prompts(*lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 128, (n,), generator=rng).tolist() for n in lengths]


class Listener(list[Output]):
    """Collects a request's outputs."""

    @property
    def tokens(self) -> list[int]:
        return [o.token for o in self if o.token is not None]

    @property
    def text(self) -> str:
        return "".join(o.text for o in self)

    @property
    def reason(self) -> str | None:
        assert all(o.finish_reason is None for o in self[:-1])
        return self[-1].finish_reason if self else None


def finish(engine: BatchingEngine) -> None:
    for _ in range(2000):
        if not engine.step():
            return
    raise AssertionError("does not end")


def unused(engine: BatchingEngine) -> bool:
    s = engine.scheduler
    return s.slots.used == s.pages.used == s.window_pages.used == len(s.waiting) == len(engine.sequences) == 0


def ask(engine: BatchingEngine, prompt: list[int], **params) -> Listener:
    heard = Listener()
    engine.submit(prompt, Params(**params), heard.append)
    return heard


@pytest.mark.parametrize("seed", range(3))
def test_any_arrival_order_equals_generate(llm, seed: int) -> None:
    """Ten requests arrive at random steps, two are cancelled; slots and pages do not suffice for all at once.

    All but the first are sampled, each with its seed: greedy tokens of random weights hardly depend on the states.
    """
    heat = {i: 0.0 if i == 0 else 1.5 for i in range(10)}
    rng = random.Random(seed)
    rows = prompts(5, 150, 1, 33, 64, 200, 17, 2, 90, 129)
    lengths = [rng.randint(1, 12) for _ in rows]
    engine = batching(llm)
    heard: dict[int, Listener] = {}
    cancelled = rng.sample(range(10), 2)
    order = rng.sample(range(10), 10)
    handles = {}
    while order or engine.sequences:
        for i in [order.pop() for _ in range(min(len(order), rng.randint(0, 3)))]:
            heard[i] = Listener()
            params = Params(lengths[i], Sampling(temperature=heat[i], seed=i))
            handles[i] = engine.submit(rows[i], params, heard[i].append)
        engine.step()
        for i in cancelled:
            if i in handles and rng.random() < 0.3:
                engine.cancel(handles[i])
    assert unused(engine)
    for i, row in enumerate(rows):
        (alone,) = llm.generate([row], max_new_tokens=lengths[i], temperature=heat[i], seed=i)
        if heard[i].reason == "cancelled":
            assert i in cancelled
            assert heard[i].tokens == alone.token_ids[: len(heard[i].tokens)]
        else:
            assert (heard[i].tokens, heard[i].text, heard[i].reason) == (alone.token_ids, alone.text, "length")


def test_logits_among_others_are_those_alone(llm) -> None:
    """A request's distribution while three others come and go, against that of the same request alone."""
    engine = batching(llm)
    row, *others = prompts(70, 100, 3, 40, 9, 80)
    heard = ask(engine, row, max_new_tokens=12, logprobs=20)
    for other in others:
        ask(engine, other, max_new_tokens=4)
        engine.step()
    finish(engine)
    (alone,) = llm.generate([row], max_new_tokens=12, return_logits=True)
    assert heard.tokens == alone.token_ids
    for output, logits in zip(heard, alone.logits, strict=True):
        p = logits.log_softmax(-1)
        assert output.logprob is not None
        assert output.logprob.chosen == pytest.approx(float(p[output.token]), abs=1e-4)
        assert [v for _, v in output.logprob.top] == pytest.approx(p.topk(20).values.tolist(), abs=1e-4)


def test_prompts_are_chunked_by_the_budget_and_decode_goes_on(llm, overlap) -> None:
    engine = batching(llm, token_budget=16)
    short = ask(engine, prompts(4)[0], max_new_tokens=100)
    engine.step()
    ask(engine, prompts(200)[0], max_new_tokens=1)
    steps = 0
    while len(engine.sequences) == 2:
        before = len(short)
        engine.step()
        steps += 1
        assert len(short) == before + 1
    assert steps == -(-200 // 15) + overlap  # the step that is launched already goes without the prompt


def test_overlapped_steps_are_the_steps_that_are_due(llm, overlap, monkeypatch) -> None:
    """With logits in one buffer, as a CUDA graph has them. Only a stop token costs a decode in vain."""
    rows = prompts(5, 9, 30)
    alone = [c.token_ids for c in llm.generate(rows, 12)]
    engine = batching(llm)
    buffer, steps = torch.full((4, llm.engine.config.vocab_size), torch.nan, device=llm.engine.device), []
    decode = engine.runner.decode

    def reused(slots):
        steps.append(len(slots))
        return buffer[: len(slots)].copy_(decode(slots))

    monkeypatch.setattr(engine.runner, "decode", reused)
    heard = [ask(engine, row, max_new_tokens=12) for row in rows]
    finish(engine)
    assert [h.tokens for h in heard] == alone
    decoded = sum(steps)
    assert decoded == 3 * 11 and unused(engine)  # each ends by its length, which is known in advance

    hot = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5, seed=5)}
    whole = ask(engine, rows[0], **hot)
    finish(engine)
    before = next(j for j in range(1, 12) if whole.tokens[j] not in whole.tokens[:j])
    steps.clear()
    stopped = ask(engine, rows[0], stop_ids=(whole.tokens[before],), **hot)
    finish(engine)
    assert stopped.tokens == whole.tokens[: before + 1] and stopped.reason == "stop" and unused(engine)
    assert sum(steps) == before + overlap


def test_samples_depend_on_the_seed_and_not_on_other_requests(llm) -> None:
    row = prompts(9)[0]
    hot = {"max_new_tokens": 10, "sampling": Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=5)}
    alone = batching(llm)
    first = ask(alone, row, **hot)
    finish(alone)
    crowd = batching(llm)
    for i in range(3):
        ask(crowd, prompts(20 + i)[0], max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=i))
        crowd.step()
    again = ask(crowd, row, **hot)
    finish(crowd)
    assert again.tokens == first.tokens
    assert first.tokens == llm.generate([row], 10, temperature=1.5, top_k=50, top_p=0.95, seed=5)[0].token_ids


def test_stop_ids_and_end_of_sequence(llm) -> None:
    row = prompts(12)[0]
    free = llm.generate([row], 20)[0].token_ids
    stop = free[6]
    cut = free[: free.index(stop) + 1]
    for eos, params in ((stop, {}), (-1, {"stop_ids": (stop,)})):
        engine = batching(llm, eos)
        heard = ask(engine, row, max_new_tokens=20, **params)
        finish(engine)
        assert (heard.tokens, heard.reason) == (cut, "stop")
        assert heard.text == llm.tokenizer.decode(cut[:-1])
    engine = batching(llm, stop)
    heard = ask(engine, row, max_new_tokens=20, ignore_eos=True)
    finish(engine)
    assert heard.tokens == free


def test_stop_strings_cut_the_text(llm) -> None:
    row = prompts(12)[0]
    text = llm.generate([row], 20)[0].text
    stop = text[9:13]
    engine = batching(llm)
    heard = ask(engine, row, max_new_tokens=20, stop=("never there", stop))
    finish(engine)
    assert (heard.text, heard.reason) == (text[: text.index(stop)], "stop")
    assert unused(engine)


def test_repetition_penalty_equals_its_definition(llm) -> None:
    row, penalty = prompts(30)[0], 1e3
    engine = batching(llm)
    heard = ask(engine, row, max_new_tokens=12, repetition_penalty=penalty)
    finish(engine)
    runner = Runner(llm.engine)
    logits, seen = runner.prefill([0], [row])[0].clone(), set(row)
    for token in heard.tokens:
        for t in seen:
            logits[t] = logits[t] / penalty if logits[t] > 0 else logits[t] * penalty
        assert token == int(logits.argmax())
        seen.add(token)
        logits = runner.decode([0], torch.tensor([token], device=runner.device))[0].clone()
    assert heard.tokens != llm.generate([row], 12)[0].token_ids


def test_cancelling_frees_at_once_and_the_next_request_starts(llm) -> None:
    engine = batching(llm, slots=1)
    first = Listener()
    handle = engine.submit(prompts(40)[0], Params(max_new_tokens=200), first.append)
    engine.step()
    second = ask(engine, prompts(7)[0], max_new_tokens=3)
    assert len(engine.scheduler.waiting) == 1
    engine.cancel(handle)
    engine.cancel(handle)
    assert engine.scheduler.slots.used == 0 and first.reason == "cancelled"
    finish(engine)
    assert second.tokens == llm.generate([prompts(7)[0]], 3)[0].token_ids


def test_waiting_ends_by_the_limit_or_the_timeout(llm) -> None:
    now = [0.0]
    serving = Serving(slots=1, max_waiting=1, wait_timeout=5, prefix_cache_bytes=0)
    engine = BatchingEngine(llm.engine, llm.tokenizer, -1, serving, clock=lambda: now[0])
    running, waiting = (ask(engine, [1, 2], max_new_tokens=40) for _ in range(2))
    with pytest.raises(QueueFull):
        ask(engine, [1], max_new_tokens=1)
    now[0] = 6.0
    engine.step()
    assert (waiting.reason, running.reason) == ("timeout", None)
    finish(engine)
    assert running.reason == "length" and unused(engine)
    assert engine.metrics.requests == {"timeout": 1, "length": 1, "refused": 1}


def test_a_failed_step_ends_its_requests_and_no_others(llm, monkeypatch) -> None:
    engine = batching(llm, slots=1)
    first, second = ask(engine, [1, 2], max_new_tokens=9), ask(engine, [3], max_new_tokens=2)
    engine.step()
    with monkeypatch.context() as m:
        m.setattr(engine.runner, "decode", lambda *_: 1 / 0)
        engine.step()
    assert first.reason == "error"
    finish(engine)
    assert second.reason == "length" and unused(engine)


def test_a_callback_that_raises_or_cancels_affects_no_other_request(llm) -> None:
    engine = batching(llm)

    def broken(output: Output) -> None:
        raise ConnectionError("gone")

    engine.submit([1, 2], Params(), broken)
    other = Listener()
    handle = engine.submit([5], Params(max_new_tokens=30), other.append)
    engine.submit([1], Params(max_new_tokens=5), lambda _: engine.cancel(handle))
    good = ask(engine, [1, 2, 3], max_new_tokens=8)
    finish(engine)
    assert other.reason == "cancelled" and unused(engine)
    assert good.tokens == llm.generate([[1, 2, 3]], 8)[0].token_ids


def test_thread_serves_many_callers(llm) -> None:
    engine = batching(llm)
    engine.start()
    done = [threading.Event() for _ in range(12)]
    heard = [Listener() for _ in done]

    def caller(i: int) -> None:
        def on_output(output: Output) -> None:
            heard[i].append(output)
            if output.finish_reason:
                done[i].set()

        engine.submit([i + 1] * (i + 1), Params(max_new_tokens=5), on_output)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(12)]
    for t in threads:
        t.start()
    for t, event in zip(threads, done, strict=True):
        t.join()
        assert event.wait(30)
    assert engine.alive and unused(engine)
    for i, h in enumerate(heard):
        assert h.tokens == llm.generate([[i + 1] * (i + 1)], 5)[0].token_ids
    left = ask(engine, [1], max_new_tokens=200)
    engine.stop()
    assert not engine.alive and left.reason in ("cancelled", "length") and unused(engine)
    with pytest.raises(QueueFull, match="shutting down"):
        ask(engine, [1])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([128], {}, "token 128 is not in the vocabulary of 128"),
        ([-1], {}, "token -1"),
        ([1], {"stop_ids": (500,)}, "token 500"),
        ([1] * 295, {"max_new_tokens": 6}, "exceed max_seq_len 300"),
        ([1] * 200, {"max_new_tokens": 60}, "need 3 KV pages"),
    ],
)
def test_bad_requests_are_refused(llm, prompt, params, message: str) -> None:
    engine = batching(llm, kv_tokens=2 * PAGE)
    with pytest.raises(JetExportError, match=message):
        ask(engine, prompt, **params)
    assert unused(engine)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_bad_parameters_are_refused(field: str, value) -> None:
    with pytest.raises(JetExportError, match=field):
        Params(**{field: value})


def test_pools_have_the_pages_of_the_capacity(llm) -> None:
    serving = Serving(slots=3, kv_tokens=3 * PAGE + 1)
    c = capacity(llm.engine, serving)
    assert (c.slots, c.pages) == (3, 4)
    engine = BatchingEngine(llm.engine, ByteTokenizer(), -1, serving)
    rows = {"slots": 3, "pages": 4, "window_pages": c.window_pages}
    for spec, pool in zip(llm.engine.specs, engine.runner.states, strict=True):
        assert pool.shape[0] == rows[spec.rows]
    wrong: dict[str, tuple[Any, ...]] = {
        "slots": (0, 5),
        "token_budget": (0, 2, 10**6),
        "kv_tokens": (-1, 0),
        "wait_timeout": (0, float("nan")),
    }
    for bad in (Serving(**{name: value}) for name, values in wrong.items() for value in values):
        with pytest.raises(JetExportError):
            capacity(llm.engine, bad)


def test_a_graph_is_not_replayed_over_another_sequence() -> None:
    """After prefill or a reset, no graph takes its buffers for the next step."""
    runner = Runner(eager_engine(Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=16)))
    nothing: Any = None
    graph = DecodeGraph(graph=nothing, cu_seqlens=nothing, integers=nothing, logits=nothing)
    for act in (lambda: runner.prefill([0], [[5]]), lambda: runner.mixed([0], [[5]]), lambda: runner.reset(0)):
        graph.slots = [0]
        runner.graphs.decode = {1: graph}
        act()
        assert graph.slots is None
