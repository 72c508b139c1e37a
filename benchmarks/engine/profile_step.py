"""Where the time of a bundle's decode steps and prefill calls goes, kernel by kernel, on this GPU.

    python benchmarks/engine/profile_step.py BUNDLE [BUNDLE ...] --cases 1:1024 128:65536 [--prefill 16:2048]

Decode cases are BATCH:CONTEXT on made-up states, replayed from a CUDA graph as the runtime does; prefill cases are
BATCH:CHUNK calls of prompts' first chunks. Kernels are summed by name over one step by torch's profiler; the step's own
time is measured without it.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jet_export.backends.load import load_engine
from jet_export.bench import timer
from jet_export.bench.measure import Case, Run
from jet_export.bundle.memory import free_cached
from jet_export.utils.environment import write_result

STEPS = 10
NUMBERS = re.compile(r"_\d+$")  # Inductor numbers its kernels: the same kernel of every layer has another number


def kernel_table(fn: Any) -> list[dict[str, Any]]:
    """Kernels of one call, the longest first: name, launches, microseconds in all."""
    found: dict[str, list[float]] = {}
    for name, times in timer.kernel_launches(fn).items():
        found.setdefault(NUMBERS.sub("", name), []).extend(times)
    rows = [{"kernel": k, "launches": len(v), "us": round(1e3 * sum(v), 1)} for k, v in found.items()]
    return sorted(rows, key=lambda r: -r["us"])


def profile_decode(engine: Any, batch: int, context: int) -> dict[str, Any]:
    run = Run(
        engine,
        Case(batch=batch, context=context, chunk=min(512, context), new_tokens=STEPS + 20, fill="synthetic"),
        0,
        True,
    )
    run.warm_up()
    run.synthesise()
    tokens = run.next

    def step() -> None:
        run.runner.decode(run.slots, tokens)

    for _ in range(3):
        step()
    took = statistics.median(timer.stopwatch(step, engine.device) for _ in range(STEPS))
    return {"case": f"decode B{batch} {context}", "ms": took, "kernels": kernel_table(step)}


def profile_prefill(engine: Any, batch: int, chunk: int) -> dict[str, Any]:
    run = Run(engine, Case(batch=batch, context=chunk, chunk=chunk, new_tokens=2, fill="synthetic"), 0, True)

    def call() -> None:
        run.reset()
        run.prefill(*next(run.calls()))

    for _ in range(2):
        call()
    took = statistics.median(timer.stopwatch(call, engine.device) for _ in range(5))
    return {"case": f"prefill B{batch} {chunk}", "ms": took, "kernels": kernel_table(call)}


def show(bundle: str, result: dict[str, Any], most: int) -> None:
    busy = sum(r["us"] for r in result["kernels"])
    table = Table(box=None, title=f"{bundle}, {result['case']}: {result['ms']:.3f} ms, {busy / 1e3:.3f} ms in kernels")
    for name in ("us", "launches", "kernel"):
        table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
    for r in result["kernels"][:most]:
        table.add_row(f"{r['us']:.1f}", str(r["launches"]), r["kernel"][:100])
    Console(width=140, highlight=False).print(table)


def pairs(texts: list[str]) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in (t.split(":") for t in texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--cases", nargs="*", default=["1:1024", "64:1024"], help="decode: BATCH:CONTEXT")
    parser.add_argument("--prefill", nargs="*", default=[], help="BATCH:CHUNK")
    parser.add_argument("--rows", type=int, default=16, help="kernels to print a case")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for bundle in args.bundles:
        engine, _ = load_engine(bundle)
        for profile, cases in ((profile_decode, pairs(args.cases)), (profile_prefill, pairs(args.prefill))):
            for a, b in cases:
                results.append({"bundle": bundle.name, **profile(engine, a, b)})
                show(bundle.name, results[-1], args.rows)
                free_cached(engine.device)
                if args.output:
                    write_result(args.output, {"results": results})
        del engine


if __name__ == "__main__":
    main()
