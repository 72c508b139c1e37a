"""Bundles whose manifest holds anything are loaded and run, or refused with one message."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.fuzzing import damaged, fuzz, mutated
from hypothesis import example, given
from rich.console import Console
from safetensors.torch import save_file

from jet_export.backends.eager import EagerEngine, load_eager
from jet_export.backends.load import check_bundle
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import MANIFEST, WEIGHTS, Manifest, describe_files
from jet_export.bundle.target import host_target
from jet_export.cli import inspect_report
from jet_export.model.jet_nemotron import empty_model
from jet_export.quantization.quantize import QuantizationReport, apply_report
from jet_export.runtime.draft_model import DraftModel, load_draft
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=32)
FP8 = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini model with one FP8 layer; its packages are no engines."""
    directory = tmp_path_factory.mktemp("bundle")
    report = QuantizationReport(fp8={FP8: {"weight_scale": 0.5, "input_scale": 0.5}}, kept=[("lm_head", "asked")])
    model = empty_model(mini_config(), torch.bfloat16, torch.device("cpu"), LIMITS.max_seq_len)
    apply_report(model, report)
    weights = {k: _some(t) for k, t in model.state_dict().items()}
    save_file({**weights, "cos_sin": model.cos_sin}, directory / WEIGHTS)
    for name in ("prefill.pt2", "decode.pt2"):
        (directory / name).write_text(name)
    Manifest(
        model={"name": "mini", "source": "random weights", "config": mini_config().to_dict()},
        backend={"name": "inductor", "torch": torch.__version__},
        target=host_target(torch.device("cpu")),
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        state_dtype="float32",
        limits=LIMITS,
        quantization=report.to_dict(),
        build={"command": ["jet-export", "build"], "date": "today", "seconds": 1.0},
        files=describe_files(directory),
    ).save(directory)
    return directory


def _some(t: torch.Tensor) -> torch.Tensor:
    """Weights with which no logit is NaN: matrices small, norms 1, scales 0.5."""
    if t.ndim < 2:
        return torch.full_like(t, 0.5 if t.numel() == 1 else 1.0)
    generator = torch.Generator().manual_seed(t.numel())
    return (torch.randn(t.shape, generator=generator) / 16).to(t.dtype)


def load_and_run(directory: Path) -> None:
    """All that a command does with a bundle but its native code, for which the eager model stands in."""
    manifest = Manifest.load(directory)
    check_bundle(directory, manifest)
    llm = LLM.over(load_eager(directory, manifest), ByteTokenizer(), -1, fingerprint=manifest.fingerprint)
    llm.generate(["abc"], 2)


def refuses(call: Any, *args: Any) -> None:
    """Runs, or raises JetExportError."""
    try:
        call(*args)
    except JetExportError as e:
        assert 10 < len(str(e)) < 2000, str(e)[:300]


@pytest.fixture
def original(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspect_report, "console", lambda: Console(file=io.StringIO()))
    text = (bundle / MANIFEST).read_text()
    yield text
    (bundle / MANIFEST).write_text(text)


def test_the_bundle_itself_runs(bundle: Path, original: str) -> None:
    load_and_run(bundle)
    inspect_report.inspect_bundle(bundle, None, None)


def _with_config(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, "model": {**values["model"], "config": {**values["model"]["config"], **changes}}}


def test_values(bundle: Path, original: str) -> None:
    values = json.loads(original)

    @given(mutated(values))
    @example({**values, "files": {**values["files"], "[/b]": {"sha256": "0" * 64, "bytes": 0}}})  # rich's MarkupError
    @example({**values, "build": {}})  # KeyError of inspect
    @example(_with_config(values, head_dim=16))  # RuntimeError: another shape than the weights'
    @fuzz(80)
    def look(values: Any) -> None:
        (bundle / MANIFEST).write_text(json.dumps(values))
        refuses(load_and_run, bundle)
        refuses(inspect_report.inspect_bundle, bundle, None, None)

    look()


def test_as_a_draft(bundle: Path, original: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle beside another one: what is loaded drafts for it."""
    values = json.loads(original)

    def load(path: Path) -> tuple[EagerEngine, Manifest]:
        manifest = Manifest.load(path)
        check_bundle(path, manifest)
        return load_eager(path, manifest), manifest

    monkeypatch.setattr("jet_export.runtime.draft_model.load_engine", load)

    def drafts() -> None:
        DraftModel(load_draft(bundle, ByteTokenizer(), 128), 2)

    @given(mutated(values))
    @example(_with_config(values, vocab_size=64))
    @example({**values, "limits": {**values["limits"], "max_batch_size": 1}})
    @fuzz(20)
    def look(values: Any) -> None:
        (bundle / MANIFEST).write_text(json.dumps(values))
        refuses(drafts)

    drafts()
    look()


def test_files(bundle: Path, original: str) -> None:
    @given(damaged(original.encode()))
    @example(b"[" * 100_000)
    @fuzz(60)
    def look(data: bytes) -> None:
        (bundle / MANIFEST).write_bytes(data)
        refuses(Manifest.load, bundle)

    look()
