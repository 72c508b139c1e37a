"""benchmarks/serving/multi_turn.py: what each turn sends, its figures for known times, and runs over real engines."""

import argparse
import asyncio
import json
import sys
from types import SimpleNamespace

import pytest
from helpers.eager_bundle import eager_engine
from helpers.scripts import load_script

from jet_export.bench import ideal
from jet_export.bundle.limits import Limits
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def script():
    return load_script("serving/multi_turn.py")


class Fake:
    """Answers with the ids 900, 901, ..., or with no ids; records prompts, and how many requests ran at each start."""

    def __init__(self, ids: bool, short: bool = False) -> None:
        self.ids, self.short, self.running = ids, short, 0
        self.prompts: list[list[int]] = []
        self.seen: list[int] = []

    async def run(self, request, trace) -> None:
        self.prompts.append(request.prompt)
        self.running += 1
        self.seen.append(self.running)
        await asyncio.sleep(0.001 * len(self.prompts))
        trace.tokens = request.new - self.short
        trace.ids = [900 + i for i in range(request.new)] if self.ids else []
        self.running -= 1


def shape_of(script, **sizes):
    return script.Shape(**{"conversations": 2, "turns": 3, "turn_tokens": 5, "output_tokens": 4, **sizes})


@pytest.mark.parametrize("ids", [True, False])
def test_a_turn_sends_all_that_was_said_and_new_ids(script, ids) -> None:
    client = Fake(ids)
    asyncio.run(script.converse(client, shape_of(script), Params(), 800, 1))
    assert [len(p) for p in client.prompts] == [5, 5, 14, 14, 23, 23]
    for before, after in zip(client.prompts, client.prompts[2:], strict=False):
        assert after[: len(before)] == before
        answer = after[len(before) : len(before) + 4]
        assert answer == [900, 901, 902, 903] if ids else max(answer) < 800  # random ones where the answer has none
    assert client.prompts[0] != client.prompts[1]
    assert client.seen == [1, 2] * 3  # a turn begins when every answer of the last one is complete


def test_an_answer_that_is_not_complete_gives_no_figure(script) -> None:
    with pytest.raises(SystemExit, match="turn 1: 3 of 4 tokens; no figure is given"):
        asyncio.run(script.converse(Fake(True, short=True), shape_of(script), Params(), 800, 1))


def test_figures_of_known_times(script) -> None:
    trace = script.Trace
    one = [[trace(0.0, [0.1, 0.11]), trace(0.0, [0.3, 0.31])], [trace(1.0, [1.2, 1.23]), trace(1.0, [1.2, 1.23])]]
    two = [[trace(0.0, [0.1, 0.11])], [trace(1.0, [1.25, 1.28])]]
    rows = script.summary([one, two], shape_of(script, turns=2), 10.0)
    assert [(r["turn"], r["prompt_tokens"]) for r in rows] == [(1, 5), (2, 14)]
    assert [(r["ttft_ms_p50"], r["ttft_ms_max"]) for r in rows] == [(100.0, 300.0), (200.0, 250.0)]
    assert [(r["ttft_steps_p50"], r["ttft_steps_max"]) for r in rows] == [(10.0, 30.0), (20.0, 25.0)]
    assert rows[1]["between_tokens_ms_p50"] == 30.0
    assert script.later(rows) == {"p50": 10.0, "max": -5.0}


SIZES = ["--conversations", "2", "--turns", "2", "--turn-tokens", "70", "--output-tokens", "5", "--repeats", "1"]


def run(script, monkeypatch, tmp_path, *words: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["multi_turn.py", *words, *SIZES, "--output", str(tmp_path / "r.json")])
    script.main()
    return json.loads((tmp_path / "r.json").read_text())


def over_engine(script, monkeypatch, device, max_seq_len: int) -> None:
    monkeypatch.setattr(ideal, "REPEATS", 1)
    limits = Limits(max_batch_size=4, max_seq_len=max_seq_len, prefill_chunk=64)
    engine = eager_engine(limits, device=device)
    manifest = SimpleNamespace(limits=limits, model={"name": "mini"}, quantization=None, dtype="float32")
    monkeypatch.setattr(script, "load_engine", lambda path: (engine, manifest))
    monkeypatch.setattr(script, "load_tokenizer", lambda path: ByteTokenizer())


def test_a_bundle_and_its_cache(script, device, monkeypatch, tmp_path, capsys) -> None:
    over_engine(script, monkeypatch, device, 200)
    result = run(script, monkeypatch, tmp_path, "mini", "--prefix-cache-bytes", "64M", "--token-budget", "64")
    assert [r["prompt_tokens"] for r in result["turns"]] == [70, 145]
    assert all(0 < r["ttft_ms_p50"] <= r["ttft_ms_max"] for r in result["turns"])
    assert result["step_ms"] == result["speeds"]["step_ms"]["2"] > 0 and result["environment"]["commit"]
    assert result["serving"] == {"token_budget": 64, "prefix_cache_bytes": 2**26}
    assert result["prompt_tokens_cached"] >= 2 * 70  # at least the prompts of the first turn
    assert "2 conversations at once" in capsys.readouterr().out
    result = run(script, monkeypatch, tmp_path, "mini", "--prefix-cache-bytes", "0")
    assert result["prompt_tokens_cached"] == 0


def test_a_server(script, monkeypatch, tmp_path) -> None:
    pytest.importorskip("fastapi")
    from helpers.serving import async_llm, server

    with server(async_llm()) as url:
        result = run(script, monkeypatch, tmp_path, url, "--model", "mini", "--vocab", "100")
        assert [r["turn"] for r in result["turns"]] == [1, 2] and result["step_ms"] > 0
        with pytest.raises(SystemExit, match="turn 1: status 404"):
            run(script, monkeypatch, tmp_path, url, "--model", "another")


def test_conversations_that_do_not_fit_are_refused(script, device, monkeypatch, tmp_path) -> None:
    over_engine(script, monkeypatch, device, 149)
    with pytest.raises(SystemExit, match="A conversation ends with 150 tokens; max_seq_len is 149"):
        run(script, monkeypatch, tmp_path, "mini")


def test_serving_options_reach_the_engine_and_the_command_line() -> None:
    options = load_script("serving/serving_options.py")
    parser = argparse.ArgumentParser()
    options.add_serving(parser)
    args = parser.parse_args(["--slots", "3", "--mixed-prefill", "64", "--prefix-cache-bytes", "2K"])
    serving = options.serving_of(args)
    assert (serving.slots, serving.mixed_prefill, serving.prefix_cache_bytes) == (3, 64, 2048)
    words = options.serve_arguments(args)
    assert words[-6:] == ["--slots", "3", "--mixed-prefill", "64", "--prefix-cache-bytes", "2048"]
    assert options.given_serving(parser.parse_args([])) == {"prefix_cache_bytes": 0}  # nothing is sent twice for free
