"""`jet-export try`: every step on jet-tiny; what fails or cannot run is recorded, and the rest goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bundles import tiny_bundle
from helpers.golden import DATA, MINI_NAMES, load_golden
from helpers.qwen import load_qwen

from jet_export.backends.eager import EagerEngine
from jet_export.bench import command, verified
from jet_export.bench.roofline import Peaks
from jet_export.bundle.limits import Limits
from jet_export.cli import app
from jet_export.model.config import JetNemotronConfig
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.tryout import measure, outputs, published, run
from jet_export.tryout.outputs import NEW_TOKENS, Outputs, compare, run_prompts
from jet_export.tryout.page import page
from jet_export.tryout.prompts import PROMPTS
from jet_export.tryout.run import TryOptions, plans_of, run_try
from jet_export.utils.errors import JetExportError
from jet_export.verify.verify import Verification


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory)


def test_every_step_on_jet_tiny(bundle: Path, tmp_path, monkeypatch, capsys) -> None:
    """The bundle is the one that the tests share, so its build finds it up to date; tests/verify verifies it."""
    monkeypatch.setattr(verified, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(run, "PROMPTS", [p[:24] for p in PROMPTS])
    monkeypatch.setattr(outputs, "NEW_TOKENS", 3)
    monkeypatch.setattr(command, "measure_peaks", lambda device, dtypes: Peaks(1e10, dict.fromkeys(dtypes, 1e11)))
    monkeypatch.setattr(measure, "verify_bundle", lambda bundle, *rest: Verification(str(bundle)))
    out = tmp_path / "out"
    shutil.copytree(bundle, out / "bundles/fp8")
    limits = ["--max-batch-size", "4", "--max-seq-len", "1024"]
    words = ["try", "jet-tiny", "--device", "cpu", "--precision", "fp8", *limits, "--output"]
    monkeypatch.setattr(sys, "argv", ["jet-export", *words, str(out)])
    with pytest.raises(SystemExit) as e:
        app.main()
    report = json.loads((out / "try.json").read_text())
    assert (e.value.code or 0, report["failures"]) == (0, [])
    assert {s["step"]: s["status"] for s in report["steps"]} == {
        "fp8: build": "ok",
        "published code": "not run",
        "PyTorch model": "ok",
        "fp8: verify": "ok",
        "fp8: ten prompts": "ok",
        "fp8: latency": "ok",
        "fp8: serving": "ok",
    }
    figures = report["precisions"]["fp8"]
    assert figures["verify"]["passed"]
    assert len(figures["logits"]["prompts"]) == len(figures["completions"]) == len(PROMPTS) == 10
    assert 0 < figures["logits"]["kl_mean"] < 0.1  # FP8 beside bf16
    assert {r["batch"] for r in figures["latency"]} == {1, 4}
    assert figures["serving"][0]["requests"] == 16
    text = (out / "try.md").read_text()
    for part in (
        "# jet-export try: jet-tiny on",
        "| fp8 | passed |",
        "on ten prompts, beside the PyTorch model",
    ):
        assert part in text
    assert f"To read and to share: {out / 'try.md'}" in capsys.readouterr().out


def made(logits: torch.Tensor, tokens: list[list[int]]) -> Outputs:
    return Outputs(logits, torch.tensor(tokens), "reference")


def test_compare() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    a = made(logits, [[1, 2, 3], [4, 5, 6]])
    same = compare(a, a)
    assert (same["kl_max"], same["same_most_likely_token"], same["new_tokens"]) == (0, 2, 3)
    other = compare(made(logits.flip(1), [[1, 9, 3], [9, 5, 6]]), a)
    assert [p["same_tokens"] for p in other["prompts"]] == [1, 0]
    p, q = logits[0].double().softmax(0), logits[0].flip(0).double().softmax(0)
    assert other["prompts"][0]["kl"] == pytest.approx(float((p * (p / q).log()).sum()))
    assert compare(made(logits + 3, [[1, 2, 3], [4, 5, 6]]), a)["kl_max"] == pytest.approx(0, abs=1e-6)


def options(tmp_path: Path, **changes: Any) -> TryOptions:
    return TryOptions(**{"model": "jet-tiny", "output": tmp_path / "out", "device": "cpu", **changes})


def test_a_step_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch) -> None:
    def build(plan: Any, command: list[str], emit: Any) -> Path:
        raise JetExportError("the disk is full.") if plan.options.fp8 else RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(run, "run_build", build)
    report = run_try(options(tmp_path), ["jet-export", "try"], lambda line: None)
    assert report["failures"] == [
        "fp8: build: the disk is full.",
        "bf16: build: RuntimeError: CUDA error: no kernel image",
    ]
    assert json.loads((tmp_path / "out/try.json").read_text())["failures"] == report["failures"]
    assert "| fp8: build | failed |" in (tmp_path / "out/try.md").read_text()


def test_without_modelopt_bf16_alone_is_planned(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("jet_export.build.steps.find_spec", lambda name: None)
    plans, refused = plans_of(options(tmp_path))
    assert list(plans) == ["bf16"]
    assert refused == {
        "fp8": "--fp8 needs nvidia-modelopt, which is not installed. pip install 'jet-export[fp8]'",
    }
    with pytest.raises(JetExportError, match="needs nvidia-modelopt"):
        plans_of(options(tmp_path, precisions=("fp8",)))


@pytest.mark.parametrize("precisions", [("int4",), ()])
def test_unknown_precisions_are_refused(tmp_path, precisions: tuple[str, ...]) -> None:
    with pytest.raises(JetExportError, match=r"--precision .*not known\.\nKnown: fp8, bf16"):
        run_try(options(tmp_path, precisions=precisions), [], lambda line: None)


def test_why_the_published_code_is_not_run(monkeypatch, tmp_path) -> None:
    config = load_golden(DATA / MINI_NAMES[0]).config
    named = {**config, "auto_map": {"AutoModelForCausalLM": "modeling_jet_nemotron.JetNemotronForCausalLM"}}
    plain, with_code = (JetNemotronConfig.from_dict(c) for c in (config, named))
    untrusted, trusted = published.Published(), published.Published(trust_remote_code=True)
    monkeypatch.setattr(published, "find_spec", lambda name: None)
    assert "random weights" in (trusted.why_not(plain, None) or "")
    assert "pip install transformers" in (trusted.why_not(with_code, tmp_path) or "")
    assert published.Published(True, Path("python")).why_not(with_code, tmp_path) is None
    monkeypatch.setattr(published, "find_spec", lambda name: object())
    assert "names no published code" in (trusted.why_not(plain, tmp_path) or "")
    assert "--trust-remote-code runs it" in (untrusted.why_not(with_code, tmp_path) or "")
    assert trusted.why_not(with_code, tmp_path) is None
    assert untrusted.why_not(JetNemotronConfig.from_dict(load_qwen("qwen3").config), tmp_path) is None


def test_the_published_code_of_a_qwen(tmp_path) -> None:
    """transformers in a process of its own, beside the eager engine."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    golden = load_qwen("qwen2")
    prompts = [golden.outputs["prompt"].tolist(), [5, 6, 7]]
    found = published.Published().run(golden.save_checkpoint(tmp_path / "ckpt"), prompts, tmp_path, "cpu")
    assert isinstance(found, Outputs), found
    assert found.tokens[0, 0] == golden.outputs["greedy"][0]
    engine = EagerEngine(golden.model(tmp_path / "again"), Limits(max_batch_size=1, max_seq_len=64, prefill_chunk=64))
    ours = run_prompts(LLM.over(engine, ByteTokenizer(), -1), prompts, "eager")
    assert ours.tokens.shape == (2, NEW_TOKENS)
    assert compare(ours, found)["kl_max"] < 0.05  # theirs in bf16
    assert "RuntimeError" not in page({**MINIMAL, "reference": found.how})


def test_published_code_that_does_not_run_says_why(tmp_path, monkeypatch) -> None:
    def failing(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "other/python"
        return subprocess.CompletedProcess(command, 1, "", "Traceback\n  ...\nImportError: no module named fla\n\n")

    monkeypatch.setattr(subprocess, "run", failing)
    why = published.Published(python=Path("other/python")).run(tmp_path, [[1]], tmp_path, "cpu")
    assert why == "transformers could not run it: ImportError: no module named fla"


MINIMAL: dict[str, Any] = {
    "model": "m",
    "command": "jet-export try m",
    "environment": dict.fromkeys(("gpu", "cpu", "torch", "cuda", "triton", "driver", "python", "date", "commit"), "?"),
    "steps": [{"step": "a|b", "status": "failed", "why": "two\n<lines>"}],
    "precisions": {},
}


def test_a_page_of_nothing_is_a_page() -> None:
    text = page(MINIMAL)
    assert "| a\\|b | failed |  | two⏎&lt;lines> |" in text
