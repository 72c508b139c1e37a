"""benchmarks/serving/workload.py: the published requests, every kind through both ways, and what is no figure."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.eager_bundle import eager_engine, eager_llm
from helpers.scripts import load_script

from jet_export.bench import ideal
from jet_export.bundle.limits import Limits
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output
from jet_export.runtime.tokenizer import ByteTokenizer


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


def test_a_run_prints_and_writes_the_share_of_the_ideal(script, device, tmp_path, monkeypatch, capsys) -> None:
    limits = Limits(max_batch_size=4, max_seq_len=128, prefill_chunk=64)
    engine = eager_engine(limits, device=device)
    work = [([i + 1] * (5 + i), 3 + i % 2) for i in range(6)]
    monkeypatch.setattr(script, "load_engine", lambda path: (engine, SimpleNamespace(limits=limits)))
    monkeypatch.setattr(script, "load_tokenizer", lambda path: ByteTokenizer())
    monkeypatch.setattr(script, "requests", lambda n, vocab: work)
    monkeypatch.setattr(ideal, "REPEATS", 1)
    words = ["workload.py", "mini", "--slots", "3", "--kinds", "greedy", "--output", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["serving"] == {
        "slots": 3,
        "prefix_cache_bytes": 0,
    }  # the second run must not find the first's prompts
    assert result["ideal"]["most_at_once"] == 3 and result["ideal"]["new_tokens"] == sum(new for _, new in work)
    step = result["speeds"]["step_ms"]["3"]
    for r in result["rows"]:
        assert r["of_ideal"] == pytest.approx(r["tokens_per_s"] / result["ideal"]["tokens_per_s"], abs=1e-3)
        assert r["between_tokens_steps_p95"] == pytest.approx(r["between_tokens_ms_p95"] / step, abs=0.02)
    out = capsys.readouterr().out
    assert [r["through"] for r in result["rows"]] == ["engine", "async"] and out.count("% of the ideal") == 2
