"""The machine that measures, as the database identifies it."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jet_export.bundle.memory import USABLE, available_memory
from jet_export.bundle.target import host_target


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where engines are measured: this machine, or nodes of a cluster that are all alike. JSON types only."""

    device: str  # cpu or cuda
    arch: str
    fp8: bool  # whether it has FP8 arithmetic
    usable_bytes: int  # see usable_memory
    machine: dict[str, Any]  # see describe_machine

    @classmethod
    def of(cls, device: torch.device) -> Host:
        return cls(
            device=device.type,
            arch=host_target(device)["arch"],
            fp8=device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9),
            usable_bytes=usable_memory(device),
            machine=describe_machine(device),
        )


def usable_memory(device: torch.device) -> int:
    """Bytes that an engine may take on the device, counted as `jet-export inspect` does."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.get_device_properties(device).total_memory)
    return available_memory(device)


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
