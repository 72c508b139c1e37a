"""The steps of `jet-export build` for AOTInductor packages: one after the other, or side by side."""

from __future__ import annotations

from pathlib import Path

import torch

from jet_export.backends.inductor.compile_worker import CompileMemory, compile_mode, compile_side_by_side
from jet_export.backends.inductor.package import check_loads, modes_for
from jet_export.build.plan import BuildPlan
from jet_export.bundle.manifest import Manifest
from jet_export.bundle.memory import available_memory, free_cached
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.utils.progress import Progress


def room_apart(plan: BuildPlan, weights: int) -> bool:
    """Whether the packages compile side by side, once this process has freed its own memory on the GPU."""
    if plan.build_device.type != "cuda":
        return False
    memory = CompileMemory(
        device="cuda",
        weights=weights,
        gpu_free=torch.cuda.mem_get_info(plan.build_device)[0] + torch.cuda.memory_reserved(plan.build_device),
        host_free=available_memory(torch.device("cpu")),
    )
    o = plan.options
    return memory.holds(len(modes_for("cuda", o.decode_one, o.fuse_decode, plan.dtypes.rollback > 0, o.mtp)))


def write_packages(
    plan: BuildPlan, manifest: Manifest, model: JetNemotronForCausalLM | None, tmp: Path, progress: Progress
) -> None:
    """Compile the packages in this process, one by one; or, without `model`, side by side from the weights file."""
    o = plan.options
    modes = modes_for(manifest.device.type, o.decode_one, o.fuse_decode, manifest.rollback > 0, o.mtp)
    if model is None:
        free_cached(manifest.device)
        with progress.stage(f"compile {', '.join(modes)} side by side", expected=plan.seconds):
            compile_side_by_side(tmp, modes, progress.emit)
    else:
        for mode in modes:
            with progress.stage(f"compile {mode}", expected=plan.seconds / len(modes)):
                compile_mode(model, manifest, mode, tmp)
    with progress.stage("check that the packages load"):
        check_loads(tmp, manifest.device.type)
