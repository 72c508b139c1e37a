"""benchmarks/engine/ablation.py: the gate of the bf16 state, cases as typed, and the table."""

import io
import json
import sys

import pytest
import torch
from helpers.scripts import load_script
from rich.console import Console

from jet_export.utils.errors import JetExportError


@pytest.fixture(scope="module")
def ablation():
    return load_script("engine/ablation.py")


def test_a_bf16_state_needs_its_committed_gate(ablation, tmp_path) -> None:
    committed = json.loads(ablation.GATE.read_text())["passed"]["bfloat16"]
    assert bool(ablation.gate_of(ablation.GATE, "bfloat16")) == (not committed)
    file = tmp_path / "gate.json"
    assert "gate.json is missing" in ablation.gate_of(file, "bfloat16")
    for passed, reason in ((True, ""), (False, "bfloat16 failed its gate (gate.json)")):
        file.write_text(json.dumps({"passed": {"bfloat16": passed}}))
        assert ablation.gate_of(file, "bfloat16") == reason


def test_cases_as_typed(ablation) -> None:
    (case,) = ablation.parse_cases("64:4096:2048", 32)
    assert (case.batch, case.context, case.chunk, case.new_tokens) == (64, 4096, 2048, 32)
    for text in ("64:4096", "a:b:c", ""):
        with pytest.raises(JetExportError, match="not a list of batch:context:chunk"):
            ablation.parse_cases(text, 32)


def test_the_table_has_the_reasons_and_the_figures_of_others(ablation) -> None:
    cases = ablation.parse_cases("128:65536:2048", 32)
    rows = [
        ablation.Result("eager PyTorch", {"B128 65536": 1000.0}, {}, {}),
        ablation.Result("engine FP8", {"B128 65536": 9000.0}, {}, {}),
        ablation.Result("+ bf16 state", {}, {}, {}, left_out="bfloat16 failed its gate"),
    ]
    out = io.StringIO()
    Console(file=out, width=250).print(ablation.table(rows, cases, "jet-2b"))
    text = out.getvalue()
    assert "9,000.0 (9.00x)" in text and "failed its gate" in text
    assert "2,885.0" in text and "paper (arXiv 2508.15884)" in text and "1,042.0" in text


def test_a_row_that_fails_verification_has_no_figures(ablation, monkeypatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(ablation, "eager_engine", lambda *a: None)
    monkeypatch.setattr(ablation, "CompiledEngine", lambda *a: None)
    monkeypatch.setattr(ablation, "verify_engines", lambda *a: [SimpleNamespace(failures=["prefill: logits: off"])])
    monkeypatch.setattr(ablation, "measure", lambda *a: pytest.fail("measured"))
    args = SimpleNamespace(device="cpu", model="jet-tiny", compile="all")
    result = ablation.run_row("torch.compile", args, [], None)
    assert not result.decode and result.left_out == "verify fails: prefill: logits: off"


@pytest.mark.parametrize(("phases", "graphs"), [("all", 2), ("decode", 1)])
def test_torch_compile_makes_a_graph_a_phase_for_every_batch(ablation, phases, graphs) -> None:
    """jet-2b's take a minute each, and batches of one would add four."""
    from helpers.fp8_models import model_of
    from torch._dynamo.utils import counters

    from jet_export.backends.eager import EagerEngine
    from jet_export.bundle.limits import Limits
    from jet_export.runtime.runner import Runner

    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    eager = EagerEngine(
        model_of(torch.float32),
        Limits(max_batch_size=4, max_seq_len=128, prefill_chunk=64),
        kv_dtype=torch.float32,
        state_dtype=torch.float32,
    )
    runners = [Runner(engine, False) for engine in (eager, ablation.CompiledEngine(eager, phases))]
    for lengths in ([7], [1], [3, 5, 5, 64]):
        slots, prompts = list(range(len(lengths))), [list(range(1, n + 1)) for n in lengths]
        tokens = torch.tensor([5] * len(lengths))
        want, got = ([r.prefill(slots, prompts).clone(), r.decode(slots, tokens).clone()] for r in runners)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] - before == graphs


def test_prefill_that_was_not_compiled_has_no_figure(ablation, monkeypatch) -> None:
    from types import SimpleNamespace

    from helpers.fp8_models import model_of

    from jet_export.backends.eager import EagerEngine
    from jet_export.bundle.limits import Limits

    limits = Limits(max_batch_size=2, max_seq_len=128, prefill_chunk=64)
    figures = ablation.Result("torch.compile", {"B1 64": 1.0}, {"B1 64": 2.0}, {"B1 64": "prefill"})
    monkeypatch.setattr(
        ablation,
        "eager_engine",
        lambda *a: EagerEngine(model_of(), limits, kv_dtype=torch.float32, state_dtype=torch.float32),
    )
    monkeypatch.setattr(ablation, "verify_engines", lambda *a: [])
    monkeypatch.setattr(ablation, "measure", lambda *a: figures)
    rows = {}
    for phases in ("all", "decode"):
        args = SimpleNamespace(device="cpu", model="jet-tiny", compile=phases, fill_seconds=1.0)
        rows[phases] = ablation.run_row("torch.compile", args, [], limits)
    assert rows["all"] == figures
    assert rows["decode"].decode == figures.decode and not rows["decode"].prefill


def run(ablation, monkeypatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--device", "cpu", *args])
    return ablation.cli(ablation.main)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nope"], "--model nope: no such preset"),
        (["--cases", "0:64:64"], "--cases 0:64:64: every number must be at least 1"),
        (["--cases", "4:64:64", "--max-batch-size", "2"], "batch 4 exceeds max_batch_size 2"),
        (["--new-tokens", "1"], "--new-tokens 1: must be at least 2"),
        (["--rows", "eager"], "--rows eager: not known"),
        (["--device", "tpu"], "--device tpu: not known"),
        (["--output", "FILE/x.json"], "FILE is a file"),
        (["--output", "."], "--output .: is a directory"),
    ],
)
def test_bad_input_is_refused_before_anything(ablation, monkeypatch, tmp_path, capsys, args, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    monkeypatch.setattr(ablation, "run_row", lambda *a: pytest.fail("ran"))
    assert run(ablation, monkeypatch, "--output", "x.json", *args) == 2
    assert message in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["FILE"]


def test_only_a_row_that_its_gate_holds_back_may_be_without_figures(ablation, monkeypatch, tmp_path) -> None:
    def outcome(error: str, gated: bool) -> int:
        def run_row(row, *rest):
            if row != "+ bf16 state":
                return ablation.Result(row, {"B1 64": 1.0}, {}, {})
            if not gated:
                raise JetExportError(error)
            return ablation.Result(row, {}, {}, {}, left_out=error, gated=True)

        monkeypatch.setattr(ablation, "run_row", run_row)
        return run(ablation, monkeypatch, "--cases", "1:64:64", "--output", str(tmp_path / "x.json"))

    assert outcome("bfloat16 failed its gate", True) == 0
    assert outcome("layers.3.mlp.gate_up_proj: wrong size", False) == 1


def test_the_gate_marks_its_row(ablation, monkeypatch, tmp_path) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(ablation, "GATE", tmp_path / "none.json")
    assert ablation.run_row("+ bf16 state", SimpleNamespace(device="cpu"), [], None).gated
