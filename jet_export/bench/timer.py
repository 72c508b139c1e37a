"""The one timer: warm-up, variants interleaved, CUDA graphs on request, median and 90th percentile.

On a GPU the clock is CUDA events, on a CPU the wall clock. Also the speeds that a figure is read against: those of a
copy and of a matrix product on the same device at the same time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ms (p90 {self.p90:.4g})"


def capture(fn: Callable[[], Any], warmup: int = 2) -> Callable[[], None]:
    """fn as the replay of a CUDA graph, warmed up (and compiled) before the capture. What is returned keeps fn, and
    with it the memory that the replays read."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return partial(_replay, graph, fn)


def _replay(graph: torch.cuda.CUDAGraph, fn: Callable[[], Any]) -> None:
    graph.replay()


def device_of(device: str | torch.device | None) -> torch.device:
    """The device to time: by default the GPU, where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def stopwatch(fn: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds from the call of `fn` to the end of its work on `device`, which must be idle before."""
    if device.type != "cuda":
        begin = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    fn()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def compare(
    variants: dict[str, Callable[[], Any]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    graph: bool = False,
    calls: int = 1,
    device: str | torch.device | None = None,
) -> dict[str, Timing]:
    """Time the variants in turn, `repeats` rounds. graph: as CUDA graphs, on a GPU. calls: units of work in one call of
    a variant, by which its time is divided."""
    device = device_of(device)
    graph = graph and device.type == "cuda"
    runs = {name: capture(fn) if graph else fn for name, fn in variants.items()}
    for fn in runs.values():
        for _ in range(warmup):
            fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, fn in runs.items():
            times[name].append(stopwatch(fn, device) / calls)
    return {name: summary(values) for name, values in times.items()}


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; of few values, the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(values: list[float]) -> Timing:
    return Timing(statistics.median(values), percentile(values, 0.9))


def copy_speed(size: int | None = None, device: str | torch.device | None = None) -> float:
    """Bytes a second of a copy within the device's memory, bytes read plus bytes written; random content.
    size: bytes of the source; by default 4 GB on a GPU, 256 MB on a CPU."""
    device = device_of(device)
    size = size or (2**32 if device.type == "cuda" else 2**28)
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    took = compare({"copy": lambda: target.copy_(source)}, repeats=10, device=device)["copy"].median
    return 2 * size / (took * 1e-3)


def matmul_speed(dtype: torch.dtype, device: str | torch.device | None = None, size: int | None = None) -> float:
    """FLOP/s of a square product of random matrices. size: by default 8192 on a GPU, 1024 on a CPU. FP8: a scaled
    product with results in bf16, on a GPU only."""
    device = device_of(device)
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones(1, device=device)
        product: Callable[[], Any] = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        product = lambda: a @ b.t()  # noqa: E731
    took = compare({"product": product}, repeats=10, device=device)["product"].median
    return 2 * n**3 / (took * 1e-3)


def kernel_launches(fn: Callable[[], Any]) -> dict[str, list[float]]:
    """Milliseconds of every kernel launch of one call, by kernel, from the profiler."""
    fn()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type.name == "CUDA":
            found.setdefault(event.name, []).append(event.device_time_total / 1e3)
    return found


def kernel_times(fn: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds in each kernel of one call."""
    return {name: sum(times) for name, times in kernel_launches(fn).items()}
