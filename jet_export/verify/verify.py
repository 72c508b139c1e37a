"""`jet-export verify`: compares a bundle's engine with the eager model of the same weights, FP8 layers included.

parity.py compares the two step by step (trial.py) within measured bounds, probes.py checks bit for bit what a step
reads, and quality.py reports the engine's quality on held-out text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from jet_export.backends.base import Engine
from jet_export.backends.eager import EagerEngine, load_eager
from jet_export.backends.load import load_engine
from jet_export.model.hf_files import TOKENIZER, tokenizer_directory
from jet_export.runtime.runner import Runner
from jet_export.runtime.tokenizer import Tokenizer
from jet_export.utils.environment import environment
from jet_export.utils.errors import JetExportError
from jet_export.verify.mtp import mtp_stage
from jet_export.verify.parity import StageResult, compare, limited, reference_engine
from jet_export.verify.probes import run_probes
from jet_export.verify.quality import HELD_OUT, Quality, measure_quality
from jet_export.verify.trial import SEQUENCES, random_prompts, scenarios

GRAPH_STEPS = 4
PROBES = "reads, to the bit"
STAGES = (
    "prefill",
    "chunked prefill",
    "ragged batch",
    "decode",
    "decode, one sequence",
    "one decode step",
    "one prefill step",
    PROBES,
)


@dataclass
class Verification:
    """The outcome of `jet-export verify`."""

    bundle: str
    stages: list[StageResult] = field(default_factory=list)
    quality: Quality | None = None
    seconds: float = 0.0
    device: str = "cpu"

    @property
    def passed(self) -> bool:
        return not self.failures()

    def failures(self) -> list[str]:
        """Stage, layer and quantity of each failure, its value and its bound."""
        return [f for s in self.stages for f in s.failures] + (self.quality.failures() if self.quality else [])

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "passed": self.passed,
            "failures": self.failures(),
            "device": self.device,
            "torch": torch.__version__,
            "environment": environment(),
            "seconds": round(self.seconds, 1),
            "stages": [s.to_dict() for s in self.stages],
            "quality": self.quality.to_dict() if self.quality else None,
        }

    def table(self) -> Group:
        """One row per stage: the logits' relative error, and the quantity nearest to its bound."""
        table = Table(box=None, header_style="bold")
        names = ("stage", "tokens", "logits' error", "bound", "KL", "cosine", "top-1", "nearest its bound", "")
        for name in names:
            left = name in ("stage", "nearest its bound", "")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for s in self.stages:
            verdict = "FAILED" if s.failures else "ok"
            if not s.measures:
                table.add_row(s.name, *[""] * 7, verdict)
                continue
            x = s.measures[0]
            worst = max(s.measures, key=lambda m: m.ratio if m.ratio == m.ratio else float("inf"))
            table.add_row(
                s.name,
                str(s.tokens),
                f"{x.relative:.1e}",
                f"{x.relative_bound:.1e}",
                f"{x.kl:.1e}",
                f"{x.cosine:.6f}",
                f"{x.top1:.1%}",
                f"{worst.what} {worst.ratio:.0%}",
                verdict,
            )
        return Group(table, *(self.quality.tables() if self.quality else []))


def verify_engines(
    engine: Engine, eager: EagerEngine, prompts: list[list[int]] | None = None, seed: int = 0
) -> Iterator[StageResult]:
    """Run the checks that need no bundle and yield each stage's result. `prompts`: SEQUENCES lists of `tokens_needed`
    ids."""
    prompts = prompts or random_prompts(eager.config, tokens_needed(eager), seed)
    with torch.no_grad():
        reference = reference_engine(eager, seed)
        base = yield from compare(engine, eager, reference, prompts, seed)
        if eager.mtp:
            yield mtp_stage(engine, eager, reference, seed)
        probes = run_probes(engine, eager, base)
    yield StageResult(PROBES, 0, [], [p.failure for p in probes if p.failure])


def tokens_needed(engine: Engine) -> int:
    return max(s.tokens for s in scenarios(engine.config, engine.limits, engine.rollback))


def graph_stage(engine: Engine, prompts: list[list[int]]) -> StageResult:
    """Check that decode by CUDA graph equals decode without one, bit for bit."""
    n = min(SEQUENCES, engine.limits.max_batch_size)
    length = min(64, engine.limits.prefill_chunk, engine.limits.max_seq_len - GRAPH_STEPS)
    engine = limited(engine, n, length + GRAPH_STEPS)
    logits = []
    for cuda_graphs in (True, False):
        runner = Runner(engine, cuda_graphs)
        steps = [runner.prefill(list(range(n)), [p[:length] for p in prompts[:n]])]
        for i in range(GRAPH_STEPS):
            tokens = torch.tensor([p[length + i] for p in prompts[:n]], device=engine.device)
            steps.append(runner.decode(list(range(n)), tokens).clone())
        logits.append(torch.stack(steps))
        del runner
    name = "decode by CUDA graph"
    same = torch.equal(*logits)
    error = (logits[0].float() - logits[1].float()).abs().max().item()
    failures = [] if same else [f"{name}: logits differ from decode without a graph by up to {error:.3g}, bound 0"]
    return StageResult(name, n * GRAPH_STEPS, [], failures)


def onnx_stage(engine: Engine, eager: EagerEngine, seed: int) -> StageResult:
    from jet_export.backends.onnx.engine import OnnxEngine
    from jet_export.verify.onnx import forced_stage

    assert isinstance(engine, OnnxEngine)
    return forced_stage(engine, eager, seed)


def verify_bundle(bundle: Path, text: Path | None, seed: int, emit: Callable[[str], None]) -> Verification:
    """Verify a bundle. `text`: held-out UTF-8 text; `emit` gets a line of progress for each stage."""
    start = time.monotonic()
    held_out = read_text(text or HELD_OUT)
    emit("  load the bundle and its eager model ...")
    engine, manifest = load_engine(bundle)
    eager = load_eager(bundle, manifest, getattr(engine, "weights", None))
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
    out = Verification(str(bundle), device=device)
    tokenizer = tokenizer_directory(bundle) / TOKENIZER
    trained = tokenizer.is_file() and not manifest.model["source"].startswith("random weights")
    prompts = random_prompts(eager.config, tokens_needed(eager), seed)
    if trained:  # the middle sequence reads text
        ids = Tokenizer(tokenizer).encode(held_out[: 8 * len(prompts[0])])
        prompts[1][: len(ids)] = ids[: len(prompts[1])]
    for stage in verify_engines(engine, eager, prompts, seed):
        out.stages.append(stage)
        emit(f"  {stage.name}: {'FAILED' if stage.failures else 'ok'} ({time.monotonic() - start:.1f} s)")
    if manifest.backend["name"] == "onnx":
        out.stages.append(onnx_stage(engine, eager, seed))
    elif engine.device.type == "cuda":
        out.stages.append(graph_stage(engine, prompts))
    if trained:
        emit("  held-out text ...")
        out.quality = measure_quality(engine, manifest, bundle, held_out)
    out.seconds = time.monotonic() - start
    return out


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JetExportError(f"--text {path}: no such file.") from None
    except UnicodeDecodeError as e:
        raise JetExportError(f"--text {path}: not UTF-8 ({e.reason} at byte {e.start}).") from None
