"""The one timer: CUDA events, warm-up, variants interleaved, CUDA graphs on request, median and 90th percentile.

Also what a figure has to be read with: the copy speed of the same GPU at the same time, and the environment.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ms (p90 {self.p90:.4g})"


def capture(fn: Callable[[], Any], warmup: int = 2) -> Callable[[], None]:
    """fn as the replay of a CUDA graph, warmed up (and compiled) outside of it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def compare(
    variants: dict[str, Callable[[], Any]], repeats: int = 20, warmup: int = 3, graph: bool = False, calls: int = 1
) -> dict[str, Timing]:
    """Times the variants in turn, `repeats` rounds. calls: how many units one call of a variant stands for."""
    runs = {name: capture(fn) if graph else fn for name, fn in variants.items()}
    for fn in runs.values():
        for _ in range(warmup):
            fn()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, fn in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    return Timing(statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))])


def copy_speed(size: int = 2**32) -> float:
    """Bytes a second of a device-to-device copy, bytes read plus bytes written; random content."""
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    time = compare({"copy": lambda: target.copy_(source)}, repeats=10)["copy"].median
    return 2 * size / (time * 1e-3)


def kernel_times(fn: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds in each kernel of one call, by the profiler."""
    fn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 1e3 for event in profile.key_averages() if event.device_time_total}


def environment() -> dict[str, str]:
    """What a result was measured with. The commit: $JET_COMMIT, or git's."""
    commit = os.environ.get("JET_COMMIT", "")
    if not commit:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """`result` with the environment, as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
