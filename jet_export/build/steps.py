"""The steps that `build` and `export-hf` share: requirements, weights, tokenizer and licence, quantisation."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.build.plan import BuildPlan
from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8_checkpoint import holds_kv_scales
from jet_export.model.hf_files import TOKENIZER, copy_tokenizer, tokenizer_directory
from jet_export.model.hub import checkpoint_licence, licence_files, resolve_checkpoint
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.mtp import MultiTokenPredictor, random_predictor
from jet_export.model.weights import CheckpointFiles
from jet_export.utils.compiler import find_compiler
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import DATA
from jet_export.utils.progress import Progress, hub_bars
from jet_export.utils.version import __version__

CALIBRATION = DATA / "calibration.txt"


def versions(backend: str) -> dict[str, str]:
    """The versions that a bundle depends on."""
    import triton

    out = {"jet_export": __version__, "torch": torch.__version__, "triton": triton.__version__}
    if backend in FLAVORS:
        out[backend] = FLAVORS[backend].version() or "not installed"
    if backend == "onnx" or backend in FLAVORS:
        out.update({name: version(name) for name in ("onnx", "onnxscript")})
    return out


def check_requirements(plan: BuildPlan) -> None:
    """Checked before a build downloads or loads gigabytes. Raises JetExportError naming what is missing."""
    if plan.backend.name == "inductor":
        find_compiler("an Inductor package")
    if plan.options.fp8 and find_spec("modelopt") is None:
        raise JetExportError("--fp8 needs nvidia-modelopt, which is not installed.", "pip install 'jet-export[fp8]'")


def require_backend(plan: BuildPlan) -> None:
    """Checked before the inputs of a build, which include versions. Raises JetExportError where ONNX or TensorRT, or
    what a plugin library is compiled with, is missing."""
    if plan.backend.name == "onnx":
        from jet_export.backends.onnx.export import require_onnx

        require_onnx()
    if plan.backend.name in FLAVORS:
        from jet_export.build.tensorrt import require

        require(plan)


def fetch_checkpoint(plan: BuildPlan, progress: Progress) -> None:
    """Download the plan's checkpoint, if it is not here yet, once everything else that the build needs is."""
    if not plan.download_bytes:
        return
    check_requirements(plan)
    with progress.stage(f"download {plan.options.model}, where it is not in the hub's cache") as stage:
        plan.directory = resolve_checkpoint(plan.options.model, bars=hub_bars(stage))
    plan.config = JetNemotronConfig.from_json_file(plan.directory / "config.json")


def load_model(plan: BuildPlan) -> JetNemotronForCausalLM:
    """The checkpoint, or random weights, on the build's device."""
    device = plan.build_device
    if plan.options.random_weights:
        return random_model(plan.config, plan.dtypes.model, device, plan.options.seed, plan.limits.max_seq_len)
    assert plan.directory is not None
    length = plan.limits.max_seq_len
    return JetNemotronForCausalLM.from_pretrained(
        plan.directory, plan.dtypes.model, device, length, mtp=plan.options.mtp
    )


def add_predictor(plan: BuildPlan, model: JetNemotronForCausalLM) -> None:
    """Give the model its multi-token-prediction layer, which stays as it is where the model is quantised."""
    if plan.options.random_weights:
        model.mtp = random_predictor(model, plan.options.seed + 1)
    else:
        assert plan.directory is not None
        model.mtp = MultiTokenPredictor.from_pretrained(plan.directory, model)


def copy_side_files(plan: BuildPlan, tmp: Path, beside: bool = False) -> str | None:
    """Copy the checkpoint's tokenizer and licence. Returns the licence's name, where it is known. `beside`: the
    tokenizer not only to tokenizer/."""
    if plan.options.tokenizer is not None:
        copy_tokenizer(plan.options.tokenizer, tmp, beside)
        return None
    directory = plan.directory
    if directory is None or (plan.options.random_weights and plan.options.model != "jet-tiny"):
        return None
    copy_tokenizer(directory, tmp, beside)
    for p in licence_files(directory):
        shutil.copyfile(p, tmp / p.name)
    return checkpoint_licence(directory)


def quantize_model(
    plan: BuildPlan, model: JetNemotronForCausalLM, tmp: Path, progress: Progress
) -> dict[str, Any] | None:
    """Quantise projections and set KV scales as the plan says, in place; a checkpoint's own are kept. Returns the
    report as a dictionary, None where nothing is FP8."""
    from jet_export.quantization import calibrate, quantize

    o, kv_fp8 = plan.options, plan.dtypes.kv_cache == torch.float8_e4m3fn
    report = quantize.read_report(model)
    if report.fp8 and (o.keep or (o.fp8_lm_head and "lm_head" not in report.fp8)):
        flag = f"--keep {o.keep[0]}" if o.keep else "--fp8-lm-head"
        raise JetExportError(f"{flag}: the checkpoint is FP8 already.", "Start from the bf16 checkpoint.")
    if report.fp8:
        progress.emit(f"    the checkpoint is FP8: {len(report.fp8)} projections as they are")
    elif o.fp8:
        batches = _calibration(plan, tmp)
        with progress.stage("calibrate and quantise to FP8 (nvidia-modelopt)", len(batches)) as stage:
            report = quantize.quantize_fp8(model, batches, keep=o.keep, lm_head=o.fp8_lm_head, progress=stage.at)
        for line in report.summary():
            progress.emit(f"    {line}")
    if kv_fp8 and has_kv_scales(plan):
        report.kv_scales = quantize.kv_scales(model)
    elif kv_fp8:
        batches = _calibration(plan, tmp)
        with progress.stage("calibrate the FP8 KV cache", len(batches)) as stage:
            report.kv_scales = calibrate.calibrate_kv_scales(model, batches, stage.at)
    return report.to_dict() if report.fp8 or kv_fp8 else None


def _calibration(plan: BuildPlan, directory: Path) -> list[torch.Tensor]:
    """Token windows of the calibration text, by the tokenizer in `directory` if it has one."""
    from jet_export.quantization.calibrate import calibration_tokens, read_calibration_text
    from jet_export.runtime.tokenizer import Tokenizer

    text = read_calibration_text(plan.options.calibration or CALIBRATION)
    path = tokenizer_directory(directory) / TOKENIZER
    tokenizer = Tokenizer(path) if path.exists() else None
    # With random weights, more text would not make the scales more meaningful, and takes a CPU minutes.
    length, windows = (128, 1) if plan.options.random_weights else (512, 8)
    return calibration_tokens(
        tokenizer,
        text,
        vocab_size=plan.config.vocab_size,
        seq_len=min(length, plan.limits.max_seq_len),
        windows=windows,
    )


def has_kv_scales(plan: BuildPlan) -> bool:
    """Whether the loaded checkpoint has scales of an FP8 KV cache."""
    if plan.options.random_weights or plan.directory is None:
        return False
    return holds_kv_scales(CheckpointFiles.open(plan.directory).file_of, plan.config)
