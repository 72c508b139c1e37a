"""Bundles that TensorRT for RTX builds on this machine, each once a test run; they need no GPU and run on none here."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.built_once import built_once
from helpers.fp8_models import to_fp8
from helpers.short_tiny import short_tiny
from jet_export.build.build import run_build
from jet_export.build.export_hf import save_unified
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.manifest import Manifest
from jet_export.model.hub import PRESETS
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.plugins.headers import headers_for
from jet_export.quantization.calibrate import calibrate_kv_scales
from jet_export.utils.errors import JetExportError

needs_rtx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tensorrt_rtx", "onnx")),
    reason="needs tensorrt-rtx and onnx (pip install 'jet-export[tensorrt-rtx]')",
)


def need_headers() -> None:
    try:
        headers_for(None, fetch=True, emit=lambda line: None)
    except JetExportError as e:
        pytest.skip(f"no TensorRT headers, and none to be had: {e}")


def build(output: Path, model: str, **options) -> None:
    values = {
        "sm": "8.9,12.0",
        "device": "cpu",
        "fetch_headers": True,
        "keep_onnx": True,
        "max_batch_size": 4,
        "max_seq_len": 160,
        "prefill_chunk": 64,
        "output": output,
        **options,
    }
    command = ["jet-export", "build", "--model", model, "--backend", "tensorrt-rtx", "--sm", str(values["sm"])]
    run_build(make_plan(BuildOptions(model=model, backend="tensorrt-rtx", **values)), command, lambda line: None)


def build_fp8(output: Path, model: JetNemotronForCausalLM, **options) -> None:
    """By way of an FP8 checkpoint, whose scales need no modelopt here."""
    ids = torch.randint(model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    to_fp8(model, ids)
    calibrate_kv_scales(model, [ids])
    checkpoint = output.parent / f"{output.name}-checkpoint"
    checkpoint.mkdir()
    save_unified(model, checkpoint, kv_fp8=True)
    build(output, str(checkpoint), **options)


def four_b(layers: tuple[str, ...] = ("jet", "attn")) -> JetNemotronForCausalLM:
    """jet-4b's dimensions, two layers and a short vocabulary."""
    config = replace(PRESETS["jet-4b"](), layer_types=layers, vocab_size=4096, bos_token_id=0, eos_token_id=0)
    return random_model(config, torch.bfloat16, "cpu", 0, max_positions=160)


MAKERS: dict[str, Callable[[Path], None]] = {
    "jet-tiny bf16": lambda output: build(output, "jet-tiny"),
    "jet-tiny fp8, 3 layers": lambda output: build_fp8(output, short_tiny(160), state_interval=2, speculate=1),
    "jet-4b fp8, 2 layers": lambda output: build_fp8(
        output, four_b(), kv_cache_dtype="fp8", state_dtype="bfloat16", sm="8.9"
    ),
}


def rtx_bundle(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    need_headers()
    return built_once(tmp_path_factory, f"rtx {name}", MAKERS[name])


def link_files(bundle: Path, copy: Path) -> None:
    """The bundle's files as links; directories are directories."""
    for file in bundle.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(bundle)).parent.mkdir(exist_ok=True)
            (copy / file.relative_to(bundle)).symlink_to(file)


def run_on_cpu(bundle: Path, copy: Path) -> Path:
    """The bundle for a fake TensorRT: its manifest says that it is for this machine."""
    copy.mkdir()
    link_files(bundle, copy)
    manifest = Manifest.load(bundle)
    from jet_export.bundle.target import host_target

    manifest.target = host_target(torch.device("cpu"))
    (copy / "manifest.json").unlink()
    manifest.save(copy)
    return copy
