"""`jet-export build`: checkpoint -> (FP8) -> AOTInductor packages, an ONNX graph or a TensorRT plan -> bundle."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.build.inductor import room_apart, write_packages
from jet_export.build.inputs import build_inputs, up_to_date
from jet_export.build.plan import BuildPlan
from jet_export.build.steps import (
    add_predictor,
    check_requirements,
    copy_side_files,
    fetch_checkpoint,
    load_model,
    quantize_model,
    require_backend,
    versions,
)
from jet_export.bundle.dtypes import dtype_name
from jet_export.bundle.manifest import WEIGHTS, Manifest, describe_files
from jet_export.bundle.memory import free_cached
from jet_export.bundle.target import host_target
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.weights import save_tensors
from jet_export.plugins.targets import sm_name, sm_of_arch
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import remove_leftovers, replace_directory
from jet_export.utils.progress import Progress

LOADED = 1e9  # bytes of weights a second, to say how long is left


def run_build(plan: BuildPlan, command: list[str], emit: Callable[[str], None] = print) -> Path:
    """Build the bundle in a temporary directory beside the output, and rename it at the end. Returns the output.

    `command` is recorded in the manifest. Raises JetExportError; the output is then as it was.
    """
    progress = Progress(emit)
    fetch_checkpoint(plan, progress)
    require_backend(plan)
    inputs = build_inputs(plan)
    if up_to_date(plan, inputs):
        emit(f"{plan.output} is up to date.")
        return plan.output
    check_requirements(plan)
    start = time.monotonic()
    plan.output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(plan.output)
    tmp = plan.output.parent / f".{plan.output.name}.{os.getpid()}.tmp"
    tmp.mkdir()
    try:
        manifest = _fill(plan, tmp, progress)
        manifest.files = describe_files(tmp)
        manifest.build = {
            "command": command,
            "inputs": inputs,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
        }
        manifest.save(tmp)
        if plan.sms:
            manifest.build["verified"] = _verify(plan, tmp, emit)
            manifest.save(tmp)
        replace_directory(tmp, plan.output)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return plan.output


def _verify(plan: BuildPlan, tmp: Path, emit: Callable[[str], None]) -> dict[str, Any]:
    """Verify the finished engine where this machine can run it. Returns the outcome, for the manifest.

    Raises JetExportError where it fails, so that no bundle is written.
    """
    here = sm_of_arch(host_target(plan.build_device)["arch"])
    if here not in plan.target["sms"]:
        why = f"built without a GPU of SM {', '.join(sm_name(sm) for sm in plan.target['sms'])}"
        emit(f"  NOT verified: {why}. Verify it where it is to run: jet-export verify {plan.output}")
        return {"passed": None, "why": why}
    from jet_export.verify.verify import verify_bundle

    result = verify_bundle(tmp, None, 0, emit)
    if not result.passed:
        raise JetExportError(
            "the engine fails its verification, so no bundle is written:\n  " + "\n  ".join(result.failures()[:12])
        )
    return {"passed": True, "device": result.device, "seconds": round(result.seconds, 1)}


def _manifest(plan: BuildPlan, licence: str | None, quantization: dict[str, Any] | None) -> Manifest:
    """What is known before the engine is built."""
    return Manifest(
        model={"name": plan.options.model, "source": plan.source, "licence": licence, "config": plan.config.to_dict()},
        backend={
            "name": plan.backend.name,
            "reason": plan.backend.reason,
            "dependent_launch": plan.options.fuse_decode,
            **versions(plan.backend.name),
        },
        target=plan.target,
        dtype=dtype_name(plan.dtypes.model),
        kv_cache_dtype=dtype_name(plan.dtypes.kv_cache),
        state_dtype=dtype_name(plan.dtypes.state),
        limits=plan.limits,
        state_interval=plan.dtypes.state_interval,
        rollback=plan.dtypes.rollback,
        mtp=plan.dtypes.mtp,
        fast_accumulation=plan.dtypes.fast_accumulation,
        quantization=quantization,
        warnings=plan.warnings,
    )


def _fill(plan: BuildPlan, tmp: Path, progress: Progress) -> Manifest:
    """Every file of the bundle but the manifest, which is returned."""
    with progress.stage("load weights", expected=3 + plan.memory.weights / LOADED):
        model = load_model(plan)
        licence = copy_side_files(plan, tmp)
    manifest = _manifest(plan, licence, quantize_model(plan, model, tmp, progress))
    if plan.options.mtp:
        add_predictor(plan, model)
    with progress.stage("write weights", expected=3 + plan.memory.weights / LOADED):
        tensors = {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and _tied(model))}
        save_tensors({**tensors, "cos_sin": model.cos_sin}, tmp / WEIGHTS)
    if plan.backend.name == "inductor":
        apart = room_apart(plan, sum(t.nbytes for t in tensors.values()))
        if apart:  # the processes read the weights from their file
            del model, tensors
            manifest.save(tmp)
        write_packages(plan, manifest, None if apart else model, tmp, progress)
        return manifest
    _write_graph(plan, model, tmp, progress)
    if plan.backend.name in FLAVORS:
        from jet_export.build.tensorrt import write_engine

        del model, tensors  # TensorRT reads the weights from their file
        free_cached(plan.build_device)
        write_engine(plan, tmp, progress, manifest.fp8_layers)
        manifest.backend["library_in_plan"] = True
    return manifest


def _write_graph(plan: BuildPlan, model: JetNemotronForCausalLM, tmp: Path, progress: Progress) -> None:
    from jet_export.backends.onnx.export import write_onnx

    with progress.stage("export and check the ONNX graph", expected=plan.seconds):
        write_onnx(model, tmp, plan.dtypes, plan.limits)


def _tied(model: JetNemotronForCausalLM) -> bool:
    return getattr(model.lm_head, "weight", None) is model.embed_tokens.weight
