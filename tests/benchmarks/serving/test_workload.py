"""benchmarks/serving/workload.py: the published requests, every kind through both ways, and what is no figure."""

import time

import pytest
from helpers.eager_bundle import eager_llm
from helpers.scripts import load_script

from jet_export.bundle.limits import Limits
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output


@pytest.fixture(scope="module")
def script():
    return load_script("serving/workload.py")


def test_the_requests_are_the_published_ones(script) -> None:
    work = script.requests()
    assert len(work) == 256
    assert sum(len(prompt) for prompt, _ in work) == 128_897 and sum(new for _, new in work) == 64_628


@pytest.mark.parametrize("overlap", [False, True])
def test_every_kind_gets_all_its_tokens_both_ways(script, device, overlap) -> None:
    llm = eager_llm(Limits(max_batch_size=4, max_seq_len=128, prefill_chunk=64), device=device)
    serving = Serving(slots=4, max_waiting=100, wait_timeout=1e9)
    engine = BatchingEngine(llm.engine, llm.tokenizer, -1, serving, overlap=overlap)
    work = [([i + 1] * (5 + i), 3 + i % 2) for i in range(6)]
    for kind in script.KINDS:
        for run in (script.run_engine, script.run_async):
            engine.stopping = False
            found = run(engine, work, kind)
            assert found["tokens"] == sum(new for _, new in work) and found["tokens_per_s"] > 0


def test_times_are_those_of_the_tokens(script) -> None:
    trace = script.Trace(2)
    start = time.perf_counter()
    trace.times = [[start + 1, start + 1.5, start + 2], [start + 3, start + 4]]
    found = trace.summary(start)
    assert found["tokens"] == 5 and found["seconds"] == 4.0 and found["tokens_per_s"] == 1.2
    assert found["between_tokens_ms_p50"] == 500.0 and found["between_tokens_ms_p95"] == 1000.0
    assert found["ttft_ms_p50"] == 2000.0


def test_a_request_that_ended_early_gives_no_figure(script) -> None:
    trace = script.Trace(1)
    trace.listener(0)(Output(5, finish_reason="error"))
    with pytest.raises(SystemExit, match="request 0 got 1 of 2 tokens; ended by error"):
        script.check(trace, [([1], 2)])
