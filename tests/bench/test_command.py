"""`jet-export bench`: verification comes first; what is measured, written and refused."""

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.eager_bundle import eager_engine, mini_config
from safetensors.torch import save_file

from jet_export.backends.eager import EagerEngine
from jet_export.bench import command, protocols, verified
from jet_export.bench.command import BenchOptions, baseline_bundle, run_bench
from jet_export.bench.predict import read_tables
from jet_export.bench.protocols import Asked
from jet_export.bench.roofline import Peaks, bundle_weights
from jet_export.bench.rows import precision_name
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest, describe_files
from jet_export.cli import app as cli
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=4, max_seq_len=96, prefill_chunk=32)


@pytest.fixture
def bundle(request, tmp_path, monkeypatch):
    """A bundle directory whose engine is the eager model; its parameter: tokens between two writes of the states."""
    interval = getattr(request, "param", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "mini"
    directory.mkdir()
    engine = EagerEngine(eager_engine(LIMITS).model, LIMITS, state_interval=interval)
    tensors = {k: v for k, v in engine.model.state_dict().items() if k != "lm_head.weight"}
    save_file({**tensors, "cos_sin": engine.model.cos_sin}, directory / "weights.safetensors")
    manifest = Manifest(
        model={"name": "mini", "source": "random weights, seed 0", "config": mini_config().to_dict()},
        backend={"name": "inductor", "torch": torch.__version__},
        target={"device": "cpu", "arch": "x86_64"},
        dtype="float32",
        kv_cache_dtype="float32",
        state_dtype="float32",
        limits=LIMITS,
        build={"command": ["jet-export", "build", "--model", "mini.json"]},
        files=describe_files(directory),
        state_interval=interval,
    )
    manifest.save(directory)
    monkeypatch.setattr(command, "load_engine", lambda path: (engine, manifest))
    monkeypatch.setattr(protocols, "FIRST_TOKENS", 3)  # fills of a latency case
    peaks = Peaks(1e10, {torch.float32: 1e11})
    monkeypatch.setattr(command, "measure_peaks", lambda device, dtypes: peaks)
    return directory


@pytest.fixture
def outcome(monkeypatch):
    """What verify finds, and how often it ran."""
    found = SimpleNamespace(failures=[], runs=0)

    def verify_bundle(*args):
        found.runs += 1
        return SimpleNamespace(passed=not found.failures, failures=lambda: found.failures)

    monkeypatch.setattr("jet_export.verify.verify.verify_bundle", verify_bundle)
    return found


def run(bundle, *contexts: int, output=None, lines=None, **asked):
    options = BenchOptions(
        bundle=bundle,
        asked=Asked(**{"protocol": "latency", **asked, "contexts": contexts, "new_tokens": 6}),
        output=output,
    )
    return run_bench(options, ["jet-export", "bench"], (lines if lines is not None else []).append)


def test_no_speed_where_verification_fails(bundle, outcome, monkeypatch) -> None:
    outcome.failures = ["prefill: logits: relative error 1, bound 0.1"]
    monkeypatch.setattr(command, "Subject", lambda **_: pytest.fail("measured"))
    with pytest.raises(JetExportError, match=r"verify fails \(1 failures, the first: prefill: logits.* no speed"):
        run(bundle, 32)
    with pytest.raises(JetExportError, match="verify fails"):  # and is not taken for green the second time
        run(bundle, 32)
    assert outcome.runs == 2


def test_a_verified_bundle_is_not_verified_again_until_it_changes(bundle, outcome, monkeypatch) -> None:
    run(bundle, 32)
    run(bundle, 32)
    assert outcome.runs == 1
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed 0"', '"seed 1"') + "\n")
    run(bundle, 32)
    assert outcome.runs == 2
    monkeypatch.setattr(verified, "source_digest", lambda: "another version of the code")
    run(bundle, 32)
    assert outcome.runs == 3


def test_a_verdict_of_another_bundle_does_not_count(bundle, outcome) -> None:
    run(bundle, 32)
    (file,) = verified.cache_directory().iterdir()
    key = verified.key_of(bundle)
    file.write_text(json.dumps({**json.loads(file.read_text()), "key": "0" * 64}))
    assert file.name == f"{key}.json" and verified.recall(bundle) is None
    file.write_text("{")
    assert verified.recall(bundle) is None


def test_rows_and_files(bundle, outcome, tmp_path) -> None:
    out = tmp_path / "out"
    lines: list[str] = []
    result = run(bundle, 32, 64, 512, output=out, lines=lines)
    written = json.loads((out / "bench.json").read_text())
    assert written == json.loads(json.dumps(result)) and written["complete"]
    assert {"gpu", "torch", "date", "commit"} <= written["environment"].keys()
    (b,) = written["bundles"]
    assert [(r["context"], r["batch"], r["filled_by"]) for r in b["rows"]] == [(32, 1, "prefill"), (64, 1, "prefill")]
    assert b["build_command"] == "jet-export build --model mini.json" and b["verify"]["passed"]
    for r in b["rows"]:
        assert r["decode_tokens_per_s"] > 0 and r["prefill_tokens_per_s"] > 0 and r["ttft_p50"] <= r["ttft_p99"]
        moved = r["step_bytes"]["total"] / 1e10
        assert r["decode_of_roofline"] == pytest.approx(moved * r["decode_tokens_per_s"] / r["batch"])
        assert r["state_interval"] == 1 and r["decode_of_interval_roofline"] is r["interval_step_bytes"] is None
        assert r["step_bytes"]["weights"] == bundle_weights(bundle).read
    assert [c["tokens"] for c in b["prompt_calls"]] == [16, 32] and all(c["ms"] > 0 for c in b["prompt_calls"])
    (table,) = read_tables(out / "bench.json")
    assert [c.tokens for c in table.prompt_calls] == [16, 32]
    (s,) = b["skipped"]
    assert s["reason"] == "context 512 and 6 new tokens exceed max_seq_len 96"
    assert any("skipped: context 512" in line and "--max-seq-len 518" in line for line in lines)
    assert len((out / "bench.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("bundle", [4], indirect=True)
def test_a_bundle_with_an_interval_has_the_shares_of_both_rooflines(bundle, outcome) -> None:
    (b,) = run(bundle, 32)["bundles"]
    (r,) = b["rows"]
    for share, moved in (
        (r["decode_of_roofline"], r["step_bytes"]["total"]),
        (r["decode_of_interval_roofline"], r["interval_step_bytes"]["total"]),
    ):
        assert share == pytest.approx(moved / 1e10 * r["decode_tokens_per_s"] / r["batch"])
    assert r["state_interval"] == 4 and r["interval_step_bytes"]["step_buffers"] > 0 == r["step_bytes"]["step_buffers"]
    assert r["precision"] == "fp32+state/4"


@pytest.mark.parametrize("bundle", [8], indirect=True)
def test_fewer_new_tokens_than_an_interval_are_refused_before_anything_runs(bundle, outcome) -> None:
    with pytest.raises(JetExportError, match=r"--new-tokens 6: the bundle writes its states every 8 tokens.*\n.*48"):
        run(bundle, 32)
    assert outcome.runs == 0


def test_without_git_the_commit_is_unknown(bundle, outcome, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("JET_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(bundle, 32)["environment"]["commit"] == "unknown"


def test_batch_auto_takes_the_bundles_limit(bundle, outcome) -> None:
    lines: list[str] = []
    result = run(bundle, 32, batches=(0,), lines=lines)
    assert [r["batch"] for r in result["bundles"][0]["rows"]] == [4]
    assert any("batch 4 is the bundle's max_batch_size" in line for line in lines)


def test_a_baseline_is_swept_and_compared(bundle, outcome) -> None:
    options = BenchOptions(
        bundle=bundle,
        asked=Asked(protocol="latency", contexts=(32,), batches=None, new_tokens=6),
        baselines=(str(bundle),),
    )
    result = run_bench(options, ["jet-export"], lambda line: None)
    assert [sorted(r["batch"] for r in b["rows"]) for b in result["bundles"]] == [[1, 2, 4]] * 2
    ours, theirs = ({r["batch"]: r["batch"] / r["decode_tokens_per_s"] for r in b["rows"]} for b in result["bundles"])
    in_time = {"equal time per token"} if min(ours.values()) <= theirs[4] else set()  # real times: either may happen
    assert {r["at"] for r in result["ratios"]} == {"equal batch", "largest batch"} | in_time
    assert all((r["ratio"] is None) == (r["baseline_of_roofline"] < 0.7) for r in result["ratios"])


def test_serving_takes_memory_for_its_own_requests_only(bundle, outcome, monkeypatch) -> None:
    from jet_export.runtime import batching

    seen = []
    capacity = batching.__dict__["capacity"]

    def recorded(*args):
        seen.append(capacity(*args))
        return seen[-1]

    monkeypatch.setattr(batching, "capacity", recorded)
    run(bundle, 8, protocol="serving", batches=(3,))
    assert (seen[0].slots, seen[0].pages) == (3, 3)


def test_serving_finishes_every_request(bundle, outcome) -> None:
    result = run(bundle, 40, protocol="serving", batches=(2,))
    (r,) = result["bundles"][0]["serving"]
    assert (r["slots"], r["requests"], r["new_tokens"]) == (2, 8, 6)
    assert 0 < r["ttft_p50"] <= r["ttft_p99"] and 0 < r["ms_per_token_p50"] <= r["ms_per_token_p99"]
    assert r["total_tokens_per_s"] == pytest.approx(r["tokens_per_s"] * 46 / 6)


def test_serving_samples_as_asked(bundle, outcome, monkeypatch, capsys) -> None:
    params = Params(sampling=Sampling(temperature=0.8, top_k=5, top_p=0.9), presence_penalty=0.5, logprobs=2)
    seen: list[Params] = []
    submit = BatchingEngine.submit

    def recorded(self, prompt, params, *args, **kwargs):
        seen.append(params)
        return submit(self, prompt, params, *args, **kwargs)

    monkeypatch.setattr(BatchingEngine, "submit", recorded)
    result = run(bundle, 40, protocol="serving", batches=(2,), params=params)
    (r,) = result["bundles"][0]["serving"]
    assert (r["temperature"], r["top_k"], r["top_p"], r["presence_penalty"], r["logprobs"]) == (0.8, 5, 0.9, 0.5, 2)
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith("t 0.8 top_k 5 top_p 0.9 presence 0.5 2 logprobs")
    measured = seen[-8:]  # after those that warm up
    for p in measured:
        asked = replace(params, max_new_tokens=6, ignore_eos=True)
        assert replace(p, sampling=params.sampling) == asked and replace(p.sampling, seed=0) == params.sampling
    assert len({p.sampling.seed for p in measured}) == 8
    refused: list[dict[str, Any]] = [{"params": params}, {"params": Params(logprobs=0)}, {"mixed_prefill": 8}]
    for options in refused:
        with pytest.raises(JetExportError, match=r"--protocol latency decodes greedily.*\nPass --protocol serving"):
            run(bundle, 40, protocol="latency", **options)


def csv_cell(value) -> str:
    return "" if value is None else str(value)


def test_serving_is_a_table_and_a_csv(bundle, outcome, tmp_path, capsys) -> None:
    lines: list[str] = []
    result = run(bundle, 40, 8, protocol="serving", batches=(2,), output=tmp_path / "out", lines=lines)
    (b,) = result["bundles"]
    with open(tmp_path / "out" / "bench.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for line, r in zip(rows, b["serving"], strict=True):
        assert line == {"model": "mini", "precision": "fp32", **{k: csv_cell(v) for k, v in r.items()}}
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["model", "context", "new", "tokens"]
    assert [line.split()[:6] for line in out[1:]] == [["mini", "fp32", n, "6", "8", "2"] for n in ("40", "8")]
    assert lines[-1] == f"written: {tmp_path / 'out' / 'bench.json'}, {tmp_path / 'out' / 'bench.csv'}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--protocol", "fast"], "--protocol fast: not known"),
        (["--contexts", "1k,?"], "--contexts 1k,?: not a list"),
        (["--batch", "most"], "--batch most: neither auto"),
        (["--new-tokens", "1"], "--new-tokens 1: must be at least 2"),
        (["--baseline", "qwen9"], "--baseline qwen9: neither a bundle nor a baseline"),
        (["--batch", "²"], "--batch ²: neither auto"),
        (["--min-p", "2"], "min_p 2.0 is not in [0, 1]"),
        (["--logprobs", "99"], "logprobs 99 is not between"),
        (["--frequency-penalty", "1"], "--protocol latency decodes greedily, without a scheduler"),
        (["--protocol", "paper", "--contexts", "5000"], "the paper has no context of 5000 tokens"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(bundle, outcome, monkeypatch, capsys, args, message) -> None:
    monkeypatch.setattr(sys, "argv", ["jet-export", "bench", str(bundle), *args])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2 and message in capsys.readouterr().err and outcome.runs == 0


def test_an_output_that_is_a_file_is_refused_before_anything_runs(bundle, outcome, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(JetExportError, match=r"--output .*: .*file is a file.\nName a directory"):
            run(bundle, 32, output=output)
    assert outcome.runs == 0 and (tmp_path / "file").read_text() == "mine"


def test_a_refusal_leaves_no_directory(bundle, outcome, tmp_path) -> None:
    for directory, asked in ((tmp_path / "nosuch", {}), (bundle, {"protocol": "paper"})):
        with pytest.raises(JetExportError):
            run(directory, 32, output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_where_every_case_is_skipped_nothing_is_complete(bundle, outcome, tmp_path) -> None:
    for protocol in ("latency", "serving"):
        lines: list[str] = []
        with pytest.raises(JetExportError) as e:
            run(bundle, 512, 1024, output=tmp_path / "out", protocol=protocol, lines=lines)
        assert str(e.value).startswith("bench: no case could be measured.\nskipped: context 512, batch 1")
        assert "--max-seq-len 1030" in str(e.value) and not any("skipped" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_baseline_is_built_with_the_limits_of_the_bundle(bundle, monkeypatch, tmp_path) -> None:
    asked = []
    monkeypatch.setattr("jet_export.build.build.run_build", lambda plan, words, emit: asked.append((plan, words)))
    monkeypatch.chdir(tmp_path)
    for name in ("qwen3-1.7b", "qwen3-1.7b:fp8"):
        baseline_bundle(name, Manifest.load(bundle), lambda line: None)
    (bf16, words), (fp8, _) = asked
    assert bf16.limits == fp8.limits == LIMITS and not bf16.options.fp8 and fp8.options.fp8
    assert bf16.options.random_weights and bf16.config.qk_norm and "--random-weights" in words
    assert bf16.output != fp8.output
    fast = replace(Manifest.load(bundle), fast_accumulation=True)
    for name in ("qwen3-1.7b", "qwen3-1.7b:fp8"):
        baseline_bundle(name, fast, lambda line: None)
    assert [(p.options.fast_accumulation, words[-1]) for p, words in asked[2:]] == [
        (False, str(bf16.output)),
        (True, "--fast-accumulation"),
    ]
    assert asked[2][0].output == bf16.output and asked[3][0].output not in (bf16.output, fp8.output)


def test_fast_accumulation_is_part_of_the_precision() -> None:
    """By which predictions choose their table."""
    dtypes = Dtypes(model=torch.bfloat16, kv_cache=torch.float8_e4m3fn, fast_accumulation=True)
    assert precision_name(dtypes, fp8=True) == "fp8+fast+fp8 kv"
