"""`jet-export export-hf`: a checkpoint for other engines, FP8 in nvidia-modelopt's unified Hugging Face format.

Published tensor names, `weight_scale` and `input_scale` beside each FP8 weight, `k_scale` and `v_scale` for an FP8 KV
cache, `hf_quant_config.json`, tokenizer and licence: see model/fp8_checkpoint.py. `from_pretrained` and
`jet-export build --checkpoint` read it back and compute the same logits. `--target trtllm-1.2` is a legacy format
(trtllm/engine_flow.py), which they do not read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from jet_export.build.plan import BuildOptions, BuildPlan, make_plan
from jet_export.build.steps import check_requirements, copy_side_files, fetch_checkpoint, load_model, quantize_model
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.fp8_checkpoint import (
    HF_QUANT_CONFIG,
    exclude_modules,
    fp8_tensors,
    hf_quant_config,
    kv_scale_tensors,
    quantization_config,
)
from jet_export.model.hf_files import write_config
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.qwen3_5 import not_yet
from jet_export.model.weights import checkpoint_layout, published_tensors, save_shards
from jet_export.quantization.quantize import linear_paths
from jet_export.trtllm.engine_flow import LEGACY, save_engine_flow
from jet_export.utils.console import human
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import replace_directory
from jet_export.utils.progress import Progress

TARGETS = ("hf", "trtllm-1.2")
MODELOPT = "0.47.0"  # defines the format; recorded as the producer's version where modelopt is not installed


def run_export(options: BuildOptions, target: str = "hf", emit: Callable[[str], None] = print) -> Path:
    """Write the checkpoint that `options` describes, in a temporary directory renamed at the end.

    Raises JetExportError for invalid options, an output that exists, and errors of loading and quantising.
    """
    if target not in TARGETS:
        raise JetExportError(f"--target {target}: not known.", f"Known: {', '.join(TARGETS)}.")
    assert options.output is not None
    plan = make_plan(options)
    if target != "hf":
        not_yet(plan.config, f"--target {target}", "There is --target hf.")
    check_output(options.output, options.force)
    check_requirements(plan)
    progress = Progress(emit)
    fetch_checkpoint(plan, progress)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    tmp = options.output.parent / f".{options.output.name}.{os.getpid()}.tmp"
    tmp.mkdir()
    try:
        write_export(plan, target, tmp, progress)
        nbytes = sum(p.stat().st_size for p in tmp.glob("*.safetensors"))
        replace_directory(tmp, options.output)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    emit(f"{options.output}: {human(nbytes)} of weights")
    if target != "hf":
        emit(LEGACY)
    return options.output


def check_output(output: Path, force: bool) -> None:
    """Raises JetExportError where the output is taken. `force` allows replacing a checkpoint, and nothing else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "config.json").is_file():
        raise JetExportError(f"--output {output}: exists and is not a checkpoint.", "Choose another place.")
    if not force:
        raise JetExportError(f"--output {output}: holds a checkpoint.", "Pass --force to replace it.")


def write_export(plan: BuildPlan, target: str, directory: Path, progress: Progress) -> None:
    with progress.stage("load weights"):
        model = load_model(plan)
        copy_side_files(plan, directory, beside=True)
    quantize_model(plan, model, directory, progress)
    with progress.stage("write weights"):
        save = save_unified if target == "hf" else save_engine_flow
        save(model, directory, kv_fp8=plan.dtypes.kv_cache == torch.float8_e4m3fn)


def save_unified(model: JetNemotronForCausalLM, directory: Path, kv_fp8: bool) -> dict[str, Any] | None:
    """Tensors, config.json and, where anything is FP8, hf_quant_config.json, which is returned.

    A tied lm_head that was quantised is a matrix of its own, so config.json says that it is not tied.
    """
    c = model.config
    untied = c.tie_word_embeddings and isinstance(model.lm_head, Fp8Linear)
    config = {**c.to_dict(), "tie_word_embeddings": c.tie_word_embeddings and not untied}
    config.pop("quantization_config", None)  # of the source
    tensors = published_tensors(model)
    param_of = {n: s.param for n, s in checkpoint_layout(c).items()}
    if untied:
        param_of["lm_head.weight"] = "lm_head.weight"
        tensors["lm_head.weight"] = model.lm_head.weight
    tensors.update(fp8_tensors(model, param_of))
    if kv_fp8:
        tensors.update(kv_scale_tensors(model))
    fp8 = [path for path in linear_paths(model) if isinstance(model.get_submodule(path), Fp8Linear)]
    quant = None
    if fp8 or kv_fp8:
        exclude = exclude_modules(param_of, fp8, linear_paths(model))
        quant = hf_quant_config(bool(fp8), kv_fp8, exclude, modelopt_version())
        config["quantization_config"] = quantization_config(quant)
        (directory / HF_QUANT_CONFIG).write_text(json.dumps(quant, indent=4) + "\n")
    save_shards(tensors, directory)
    write_config(config, directory, model.dtype)
    return quant


def modelopt_version() -> str:
    try:
        return version("nvidia-modelopt")
    except PackageNotFoundError:
        return MODELOPT
