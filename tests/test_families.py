"""A small Qwen3.5 with its multi-token-prediction layer through the tools, compiled for the CPU: `make families`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.mtp import small_directory
from typer.testing import CliRunner

from jet_export import LLM
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.cli.app import app

pytestmark = pytest.mark.skipif("JET_FAMILIES" not in os.environ, reason="compiles for minutes: make families")
SPACE = """
[jet]
sizes = ["preset", "64x128x8"]
num_key_heads = [2]
[constraints]
cache_bytes = "none"
[measure]
batch = [1]
context = [64]
prefill_chunk = 64
new_tokens = 32
layers = 1
repeats = 2
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_directory(tmp_path_factory.mktemp("families") / "qwen")


def run(*arguments: Any) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_layer_drafts_for_its_bundle(directory: Path, tmp_path: Path) -> None:
    """Verified; the same tokens as without drafts, greedy and sampled; and this layer is always right."""
    limits = "--max-batch-size", 2, "--max-seq-len", 256, "--prefill-chunk", 64
    bundle = tmp_path / "bundle"
    run("build", "--model", directory, "--dtype", "float32", "--speculate", 3, "--mtp", *limits, "--output", bundle)
    done = CliRunner().invoke(app, ["verify", str(bundle)], catch_exceptions=False)
    assert done.exit_code == 0 and "multi-token prediction" in done.output, done.output
    assert "multi-token-prediction layer" in CliRunner().invoke(app, ["inspect", str(bundle)]).output
    answers = []
    for speculate in ("off", "mtp"):
        llm = LLM(bundle, speculate=speculate)
        if llm.batching.speculation:
            llm.batching.speculation.lengths.fixed = True  # as long as they may be, whatever they cost
        for temperature in (0.0, 1.0):
            made = llm.generate(["def f(x):", "1, 2, 3,", "Hello"], 40, temperature=temperature, ignore_eos=True)
            answers.append([c.token_ids for c in made])
    drafts = llm.batching.metrics.drafts
    assert answers[:2] == answers[2:]
    assert drafts is not None and sum(drafts.accepted) == sum(drafts.drafted) > 100


def test_try(directory: Path, tmp_path: Path) -> None:
    run("try", directory, "--precision", "bf16", "--max-batch-size", 2, "--max-seq-len", 256, "--output", tmp_path)
    report = json.loads((tmp_path / "try.json").read_text())
    assert not report["failures"] and report["precisions"]["bf16"]["verify"]["passed"]
    assert report["precisions"]["bf16"]["latency"] and report["precisions"]["bf16"]["serving"]


def test_search(directory: Path, tmp_path: Path) -> None:
    """Layers measured, the choice built whole, and its config.json builds; again on a machine in use."""
    (tmp_path / "space.toml").write_text(SPACE)
    options = ["--space", tmp_path / "space.toml", "--jobs", 1, "--whole", 1, "--output", tmp_path / "search"]
    arguments = [str(a) for a in ("search", "--model", directory, "--device", "cpu", "--dtype", "float32", *options)]
    done = CliRunner().invoke(app, arguments)
    for _ in range(5):
        if done.exception is None:
            break
        assert "was the machine in use?" in str(done.exception), done.output
        done = CliRunner().invoke(app, [*arguments, "--resume", "--remeasure"])
    assert done.exception is None and "measured whole" in done.output
    best = make_plan(BuildOptions(model=str(tmp_path / "search/best.json"), random_weights=True, device="cpu"))
    assert best.config.model_type == "qwen3_5_text" and best.config.key_heads == 2
