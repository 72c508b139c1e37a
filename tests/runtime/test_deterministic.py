"""`deterministic` is batch-invariant: a request's tokens and logits are the same bits whatever else runs."""

import pytest
import torch
from helpers.batching import among_others, distinct, repeats, require_placeless_rows, tokens
from helpers.eager_bundle import eager_engine, eager_llm

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.runner import Runner
from jet_export.runtime.tokenizer import ByteTokenizer

LIMITS = Limits(max_batch_size=8, max_seq_len=300, prefill_chunk=64)
PROMPT = tokens(100, 0)


@pytest.mark.parametrize(("dtype", "kv"), [(torch.float32, None), (torch.bfloat16, torch.float8_e4m3fn)])
def test_twenty_repeats_are_the_same_bits(device, dtype, kv) -> None:
    engine = eager_engine(LIMITS, device=device, dtype=dtype, kv_dtype=kv)
    require_placeless_rows(engine.model, LIMITS.max_batch_size)

    def make(**serving) -> BatchingEngine:
        return BatchingEngine(engine, ByteTokenizer(), -1, Serving(**serving))

    runs = repeats(lambda: make(deterministic=True), PROMPT, 20)
    assert distinct(runs) == 1
    fewer = repeats(lambda: make(deterministic=True, slots=3, token_budget=64), PROMPT, 3)
    assert distinct([runs[0], *fewer]) == 1  # the bundle decides the shapes, not the serving options


def test_without_it_bits_depend_on_the_batch(device) -> None:
    """Why the mode exists: matrix products of other sizes sum in another order."""
    if device.type == "cuda":
        pytest.skip("cuBLAS may or may not change the order of summation at these sizes")
    engine = eager_engine(LIMITS)
    assert distinct(repeats(lambda: BatchingEngine(engine, ByteTokenizer(), -1, Serving()), PROMPT, 5)) > 1


def test_generate_agrees_with_serving(device) -> None:
    llm = eager_llm(LIMITS, device=device, deterministic=True)
    assert isinstance(llm.engine, EagerEngine)
    require_placeless_rows(llm.engine.model, LIMITS.max_batch_size)
    rows = [tokens(n, n) for n in (150, 3, 64, 129, 20, 1, 90, 31, 200)]
    together = llm.generate(rows, 8, return_logits=True)
    engine = BatchingEngine(llm.engine, llm.tokenizer, -1, Serving(deterministic=True))
    for row, a in zip(rows, together, strict=True):
        (b,) = llm.generate([row], 8, return_logits=True)
        served = engine.submit(row, Params(8), lambda _: None, keep_logits=True)
        while engine.step():
            pass
        assert a.token_ids == b.token_ids == served.tokens
        assert a.logits is not None and b.logits is not None
        assert torch.equal(a.logits, b.logits) and torch.equal(a.logits, torch.stack(served.logits))


def test_every_call_has_the_same_shape(device, monkeypatch) -> None:
    """Decode: max_batch_size rows, whatever runs. Prefill: one sequence, chunks that end at multiples of the chunk."""
    engine = eager_engine(LIMITS, device=device)
    decode, prefill = [], []
    run_decode, run_prefill = engine.decode, engine.prefill

    def recorded_decode(ids, batch, states):
        decode.append(len(ids))
        return run_decode(ids, batch, states)

    def recorded_prefill(ids, batch, *rest):
        prefill.append((len(batch.slots), int(batch.context_lens[0]), len(ids)))
        return run_prefill(ids, batch, *rest)

    monkeypatch.setattr(engine, "decode", recorded_decode)
    monkeypatch.setattr(engine, "prefill", recorded_prefill)
    batching = BatchingEngine(engine, ByteTokenizer(), -1, Serving(deterministic=True), cuda_graphs=False)
    among_others(batching, tokens(150, 0), [(tokens(n, n), 9) for n in (70, 5, 130)], 2)
    assert set(decode) == {LIMITS.max_batch_size}
    assert {n for n, _, _ in prefill} == {1}
    lengths = {(start, n) for _, start, n in prefill}
    assert lengths == {(0, 64), (64, 64), (128, 22), (64, 6), (0, 5), (128, 2)}


@pytest.mark.gpu
def test_cuda_graphs_agree_with_plain_calls(device) -> None:
    engine = eager_engine(LIMITS, device=device, dtype=torch.bfloat16)
    runs = []
    for graphs in (True, False):
        make = lambda g=graphs: BatchingEngine(engine, ByteTokenizer(), -1, Serving(deterministic=True), cuda_graphs=g)  # noqa: E731
        runs += repeats(make, PROMPT, 8)
    assert distinct(runs) == 1


def test_one_padded_sequence_has_the_bits_of_a_full_bucket(device) -> None:
    engine = eager_engine(LIMITS, device=device)
    require_placeless_rows(engine.model, LIMITS.max_batch_size)
    runner = Runner(engine, deterministic=True)
    rows = [tokens(20 + i, i) for i in range(8)]
    runner.prefill(list(range(8)), rows)
    states = [s.clone() for s in runner.states]
    ids = torch.arange(8, device=runner.device)
    together = runner.decode(list(range(8)), ids).clone()
    for i in (0, 3, 7):
        for state, before in zip(runner.states, states, strict=True):
            state.copy_(before)
        runner.hold(i, 20 + i)
        assert torch.equal(runner.decode([i], ids[i : i + 1])[0], together[i])
