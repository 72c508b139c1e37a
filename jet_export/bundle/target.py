"""The device that a bundle is built for, and what it requires of the machine that runs it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from jet_export.utils.errors import JetExportError


def host_target(device: torch.device) -> dict[str, Any]:
    """What code compiled here for `device` requires of the machine that runs it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"device": "cuda", "arch": f"sm_{major}{minor}", "gpu": torch.cuda.get_device_name(device)}
    return {"device": "cpu", "arch": platform.machine(), "isa": _cpu_isa()}


def has_dependent_launch(target: dict[str, Any]) -> bool:
    """Whether kernels for this target may wait for their inputs themselves: from SM 9.0 on."""
    return target["device"] == "cuda" and int(str(target.get("arch", "sm_0")).removeprefix("sm_")) >= 90


def _cpu_isa() -> list[str]:
    """The vector extensions of this CPU, which -march=native may have used."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [torch.backends.cpu.get_cpu_capability()]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(f for f in flags if f.startswith(("avx", "amx", "fma", "bmi", "sve", "asimd", "f16c")))


def target_device(requested: str) -> torch.device:
    """`auto`: the GPU where there is one. Raises JetExportError for cuda without a GPU."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested not in ("cpu", "cuda"):
        raise JetExportError(f"--device {requested}: not known.", "Known: auto, cpu, cuda.")
    if requested == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is a CPU build" if built is None else "torch sees no GPU (driver missing, or none visible)"
        raise JetExportError(f"--device cuda: {why}.", "Build on a machine with the GPU, or pass --device cpu.")
    return torch.device(requested)
