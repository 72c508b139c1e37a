"""benchmarks/serving/serve_load.py: its figures for answers with known times, and a run over a real engine."""

import argparse
import asyncio
import json
import sys

import pytest
from helpers.scripts import load_script

from jet_export.bench import ideal
from jet_export.bench.ideal import Speeds


@pytest.fixture(scope="module")
def load():
    return load_script("serving/serve_load.py")


class Fake:
    """A client whose answers take 10 ms per token; records how many run at once."""

    def __init__(self) -> None:
        self.running = 0
        self.seen: list[int] = []

    async def run(self, request, trace) -> None:
        self.running += 1
        self.seen.append(self.running)
        for _ in range(request.new):
            await asyncio.sleep(0.01)
            trace.times.append(asyncio.get_running_loop().time())
            trace.tokens += 1
        self.running -= 1


def requests(load, *new: int):
    return [load.LoadRequest([1], n) for n in new]


def test_closed_loop_keeps_the_concurrency_and_static_waits_for_the_slowest(load) -> None:
    a, b = Fake(), Fake()
    new = [1, 9, 1, 1, 1, 1]
    asyncio.run(load.closed_loop(a, requests(load, *new), 2))
    asyncio.run(load.static_batches(b, requests(load, *new), 2))
    assert max(a.seen) == max(b.seen) == 2
    assert a.seen == [1, 2, 2, 2, 2, 2] and b.seen == [1, 2, 1, 2, 1, 2]


def test_figures_of_known_times(load) -> None:
    trace = load.Trace
    traces = [
        trace(0.0, [0.1, 0.2, 0.3], 3),  # TTFT 100 ms, TPOT 100 ms
        trace(1.0, [1.5, 1.6], 2),  # 500, 100
        trace(1.0, [1.1, 1.5, 2.0], 3),  # 100, 450
        trace(1.0, [], 0, "timeout"),
    ]
    s = load.summary(traces, (200, 200))
    assert (s["requests"], s["failed"], s["seconds"]) == (4, 1, 2.0)
    assert s["tokens_per_s"] == pytest.approx(4.0) and s["requests_per_s"] == pytest.approx(1.5)
    assert s["goodput_requests_per_s"] == pytest.approx(0.5) and s["within_slo"] == 0.25
    assert s["ttft_ms"] == {"p50": 100, "p95": 500, "p99": 500} and s["tpot_ms"]["p99"] == 450
    assert s["inter_token_ms"]["p99"] == 500


def test_the_seed_decides_the_work(load) -> None:
    args = args_of(prompt_tokens=50, output_tokens=10, temperature=0.7, min_p=0.1, frequency_penalty=0.5, logprobs=2)
    work = workload(load, args)
    a, b = work.requests(200, 1), work.requests(200, 1)
    assert a == b != work.requests(200, 2)
    assert all(len(x.prompt) + x.new <= 100 and min(x.prompt) >= 0 and max(x.prompt) < 128 for x in a)
    mean = sum(x.new for x in a) / len(a)
    assert 9 < mean < 11 and len({x.new for x in a}) > 5
    assert {(x.params.sampling.temperature, x.params.sampling.min_p) for x in a} == {(0.7, 0.1)}
    assert {(x.params.frequency_penalty, x.params.logprobs, x.params.ignore_eos) for x in a} == {(0.5, 2, True)}
    assert len({x.params.sampling.seed for x in a}) > 5


SPEEDS = Speeds(step_ms={1: 10.0, 4: 10.0}, held_tokens=9, prompt_tokens_per_s=1e9, prompt_shape=(1, 9))


def args_of(**values):
    parser = argparse.ArgumentParser()
    load_script("serving/serving_options.py").add_sampling(parser)
    args = parser.parse_args([])
    args.__dict__.update({"seed": 3, "prompt_tokens": 20, "output_tokens": 2, "slots": 100, **values})
    return args


def workload(load, args):
    return load.Workload(args, vocab=128, max_seq_len=100, speeds=SPEEDS, max_batch_size=4)


def test_a_poisson_run_takes_the_same_time_at_every_load(load) -> None:
    work = workload(load, args_of(loads=[0.5, 1.0], requests=7, poisson_seconds=0.5))
    rows = asyncio.run(load.poisson_part(Fake(), work, (1e3, 1e3), 40.0))
    assert [r["requests"] for r in rows] == [10, 20]
    # The fake takes 10 ms for each token, the ideal for each but the first; r["seconds"] has two digits.
    assert all(0 < r["ideal"]["seconds"] <= r["seconds"] + 0.01 for r in rows)
    work.args.poisson_seconds = None
    assert [r["requests"] for r in asyncio.run(load.poisson_part(Fake(), work, (1e3, 1e3), 40.0))] == [7, 7]


def test_warm_up_covers_every_batch_bucket(load) -> None:
    client = Fake()
    work = workload(load, args_of(concurrency=[1, 6], join_streams=2))
    asyncio.run(load.warm_up(client, work))
    assert client.seen == [n for most in (1, 2, 4, 6) for n in range(1, most + 1)]


def test_every_part_runs_on_an_engine(load, tmp_path, monkeypatch, capsys) -> None:
    from helpers.eager_bundle import eager_engine

    from jet_export.bundle.limits import Limits
    from jet_export.runtime.tokenizer import ByteTokenizer

    limits = Limits(max_batch_size=4, max_seq_len=200, prefill_chunk=64)
    engine = eager_engine(limits)
    monkeypatch.setattr(ideal, "REPEATS", 1)
    manifest = type(
        "M",
        (),
        {
            "config": engine.config,
            "limits": limits,
            "model": {"name": "mini"},
            "quantization": None,
            "dtype": "float32",
        },
    )
    monkeypatch.setattr(load.Manifest, "load", lambda path: manifest)
    monkeypatch.setattr(load, "load_engine", lambda path: (engine, manifest))
    monkeypatch.setattr(load, "load_tokenizer", lambda path: ByteTokenizer())
    options = (
        "--concurrency 1 3 --rounds 1 --requests 5 --loads 0.5 --prompt-tokens 10 --output-tokens 4 "
        "--join-streams 2 --join-seconds 0.1 --temperature 0.8 --min-p 0.1 --presence-penalty 0.5 --logprobs 2"
    )
    monkeypatch.setattr(sys, "argv", ["serve_load.py", "b", "--output", str(tmp_path / "r.json"), *options.split()])
    kept: list[list[str]] = []
    write = load.write_result

    def recorded(path, result) -> None:
        kept.append(list(result))
        write(path, result)

    monkeypatch.setattr(load, "write_result", recorded)
    load.main()
    assert ["poisson" in k for k in kept] == [False, True, True, True]  # an interrupted run keeps its finished parts
    result = json.loads((tmp_path / "r.json").read_text())
    kinds = [(r["concurrency"], r["batching"]) for r in result["concurrency"] + result["deterministic"]]
    assert kinds == [
        (1, "continuous"),
        (1, "static"),
        (3, "continuous"),
        (3, "static"),
        (1, "deterministic"),
        (3, "deterministic"),
    ]
    assert not any(r["failed"] for r in result["concurrency"] + result["poisson"])
    for r in result["concurrency"] + result["deterministic"] + result["poisson"]:
        assert r["ideal"]["achieved"] == pytest.approx(r["tokens_per_s"] / r["ideal"]["tokens_per_s"])
        assert r["ideal"]["most_at_once"] <= r.get("concurrency", 4)
    assert set(result["speeds"]["step_ms"]) == {"1", "2", "3"} and result["speeds"]["held_tokens"] == 12
    assert result["sampling"] == {"temperature": 0.8, "min_p": 0.1, "presence_penalty": 0.5, "logprobs": 2}
    assert result["join"]["prompt_tokens"] == 198 and result["join"]["while_it_joins_ms"]["gaps"] > 0
    out = capsys.readouterr().out
    assert result["environment"]["cpu"] and "goodput" in out and "of ideal" in out
