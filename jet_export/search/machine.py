"""The machine that measures, as the database identifies it."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a latency depends on besides the engine: device, driver, versions, kernels; on a CPU its threads too."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "kernels": kernel_hash()}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return {"device": name, "driver": driver_version(), "cuda": torch.version.cuda, **versions}
    return {"device": cpu_name(), "threads": torch.get_num_threads(), **versions}


@cache
def kernel_hash() -> str:
    """A hash of this package's sources and of the kernels' configurations, which decide an engine's speed."""
    from jet_export.bench.verified import source_digest

    return source_digest()[:16]


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
