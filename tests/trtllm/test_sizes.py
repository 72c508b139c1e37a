"""docs/backends/tensorrt-llm.md: its sizes are those of the configs, and its commands and options are the program's."""

import re
import subprocess
import sys

import pytest
import torch
from helpers.fp8_models import CONFIG
from helpers.paths import ROOT

from jet_export.model.cache import state_specs
from jet_export.model.config import JetNemotronConfig
from jet_export.model.presets import jet_2b, jet_4b
from jet_export.trtllm.adapt import KNOWN
from jet_export.trtllm.sizes import rows, state_shapes, tables

DOCS = (ROOT / "docs/backends/tensorrt-llm.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("config", [jet_2b(), jet_4b(), CONFIG], ids=["jet-2b", "jet-4b", "mini"])
def test_states_are_as_large_as_ours(config: JetNemotronConfig) -> None:
    """By TensorRT-LLM's formula: as many numbers as jet::jet_block's pools hold, and the same rows of each layout."""
    (H, V, K), (D, W1) = state_shapes(config)
    specs = state_specs(config, torch.bfloat16)
    assert {s.shape for s in specs if s.name.endswith("recurrent_state")} == {(H, K, V)}
    assert {s.shape for s in specs if s.name.endswith("conv_state")} == {(W1, D)}
    states = [s for s in specs if s.rows == "slots"]
    size = rows(config)
    ssm, conv = states[1], states[0]
    assert size["ssm state of a layer, fp32"].endswith(f"], {ssm.row_bytes:,} bytes a slot")
    assert size["conv state of a layer, bf16"].endswith(f"], {conv.row_bytes:,} bytes a slot")
    assert size["layers with states; with a KV cache"] == f"{len(states) // 2}; {len(specs) - len(states)}"


def test_sizes_of_a_sequence() -> None:
    """Computed from the pools, not from the fields."""
    for config, total, token in ((jet_2b(), 28.8, 4.1), (jet_4b(), 55.2, 10.2)):
        specs = state_specs(config, torch.bfloat16)
        states = sum(s.row_bytes for s in specs if s.rows == "slots")
        kv = sum(s.row_bytes // s.shape[2] for s in specs if s.rows != "slots")
        assert (round(states / 1e6, 1), round(kv / 1e3, 1)) == (total, token)
        assert rows(config)["states of a sequence, all layers"] == f"{total} MB"
        assert rows(config)["KV cache of a token, all layers, bf16"] == f"{token} KB"


def test_the_documents_tables() -> None:
    current, legacy = "\n".join(tables()).split("\n\n")
    assert current in DOCS and legacy in DOCS


def test_the_documents_commands() -> None:
    """Every option of a jet-export command in it exists, and every module it runs."""
    commands = re.findall(r"^jet-export (\S+) (.*)$", DOCS, re.M)
    assert len(commands) >= 2
    for name, rest in commands:
        args = [sys.executable, "-m", "jet_export.cli.app", name, "--help"]
        usage = subprocess.run(args, capture_output=True, text=True, check=True).stdout
        for option in re.findall(r"--[a-z0-9-]+", rest):
            assert option in usage, option
    root = ROOT
    for module in set(re.findall(r"python -m (jet_export\.[a-z_.]+)", DOCS)):
        path = root / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
    for test in set(re.findall(r"`(tests/[a-z_/.]+)`", DOCS)):
        assert (root / test).exists()


def test_the_documents_versions() -> None:
    for line in KNOWN:
        assert f"| {line}.x" in DOCS
