"""benchmarks/ablation.py: the gate of the bf16 state, cases as typed, and the table."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jet_export.errors import JetExportError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("ablation_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    monkeypatch.setattr(ablation, "CompiledEngine", lambda eager: None)
    monkeypatch.setattr(ablation, "verify_engines", lambda *a: [SimpleNamespace(failures=["prefill: logits: off"])])
    monkeypatch.setattr(ablation, "measure", lambda *a: pytest.fail("measured"))
    result = ablation.run_row("torch.compile", SimpleNamespace(device="cpu", model="jet-tiny"), [], None)
    assert not result.decode and result.left_out == "verify fails: prefill: logits: off"


def test_torch_compile_makes_two_graphs_for_every_batch(ablation) -> None:
    """One of prefill and one of decode: jet-2b's take a minute each, and batches of one would add four."""
    import torch
    from fp8_models import model_of
    from torch._dynamo.utils import counters

    from jet_export.bundle import Limits
    from jet_export.runtime.engine import EagerEngine
    from jet_export.runtime.runner import Runner

    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    eager = EagerEngine(model_of(torch.float32), Limits(4, 128, 64), torch.float32, torch.float32)
    runners = [Runner(engine, False) for engine in (eager, ablation.CompiledEngine(eager))]
    for lengths in ([7], [1], [3, 5, 5, 64]):
        slots, prompts = list(range(len(lengths))), [list(range(1, n + 1)) for n in lengths]
        tokens = torch.tensor([5] * len(lengths))
        want, got = ([r.prefill(slots, prompts).clone(), r.decode(slots, tokens).clone()] for r in runners)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] - before == 2
