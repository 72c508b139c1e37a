"""Where the time of a bundle's decode steps and prefill calls goes, kernel by kernel, on this GPU.

    python benchmarks/engine/profile_step.py BUNDLE [BUNDLE ...] --cases 1:1024 128:65536 [--prefill 16:2048]
    python benchmarks/engine/profile_step.py BUNDLE --cases 1:1024 --verify 1:1024:4 8:1024:4

Decode cases are BATCH:CONTEXT on made-up states, replayed from a CUDA graph as the runtime does; verify cases are
BATCH:CONTEXT:DRAFTS, calls that verify so many drafted tokens of each sequence, all of which count as accepted; prefill
cases are BATCH:CHUNK calls of prompts' first chunks. Kernels are summed by name by torch's profiler; the step's own
time is measured without it. Where states are written every few tokens, both are means over whole intervals, so that
kernels may have fractions of a launch. A verify call's time has its upload and its replay, and no draw.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jet_export.backends.base import Engine
from jet_export.backends.load import load_engine
from jet_export.bench import timer
from jet_export.bench.measure import Case, Run
from jet_export.bundle.memory import free_cached
from jet_export.runtime.verify_calls import VerifyCalls
from jet_export.utils.environment import write_result
from jet_export.utils.errors import JetExportError

STEPS = 10
NUMBERS = re.compile(r"_\d+$")  # Inductor numbers its kernels: the same kernel of every layer has another number


def kernel_table(fn: Callable[[], Any], calls: int = 1) -> list[dict[str, Any]]:
    """Kernels of a call, on average over so many, the longest first: name, launches, microseconds in all."""

    def several() -> None:
        for _ in range(calls):
            fn()

    found: dict[str, list[float]] = {}
    for name, times in timer.kernel_launches(several).items():
        found.setdefault(NUMBERS.sub("", name), []).extend(times)
    rows = [
        {"kernel": k, "launches": round(len(v) / calls, 2), "us": round(1e3 * sum(v) / calls, 1)}
        for k, v in found.items()
    ]
    return sorted(rows, key=lambda r: -r["us"])


def step_period(interval: int, tokens: int) -> int:
    """Steps of so many tokens a sequence from one write of the states to the next."""
    return -(-interval // tokens)


def profile_steps(engine: Engine, step: Callable[[], Any], period: int) -> dict[str, Any]:
    """The time and the kernels of a step, over whole periods."""
    for _ in range(period * -(-3 // period)):
        step()
    count = period * -(-STEPS // period)
    times = [timer.stopwatch(step, engine.device) for _ in range(count)]
    took = statistics.median(times) if period == 1 else statistics.mean(times)
    return {"ms": took, "kernels": kernel_table(step, period)}


def synthetic_run(engine: Engine, batch: int, context: int, tokens: int) -> Run:
    """Sequences that hold `context` made-up tokens, with room for those of the steps that are profiled, `tokens` of
    each sequence in one."""
    room = tokens * (STEPS + 5 * step_period(engine.state_interval, tokens) + 3)
    case = Case(batch=batch, context=context, chunk=min(512, context), new_tokens=room, fill="synthetic")
    run = Run(engine, case, 0, True)
    run.warm_up()
    run.synthesise()
    return run


def profile_decode(engine: Engine, batch: int, context: int) -> dict[str, Any]:
    run = synthetic_run(engine, batch, context, 1)
    tokens = run.next

    def step() -> None:
        run.runner.decode(run.slots, tokens)

    return {"case": f"decode B{batch} {context}", **profile_steps(engine, step, engine.state_interval)}


def verify_step(engine: Engine, run: Run, drafts: int) -> Callable[[], None]:
    """A call that verifies so many drafted tokens of each sequence, which all hold them afterwards. Raises
    JetExportError where the engine verifies fewer."""
    if not 1 <= drafts < max(engine.rollback, 1):
        raise JetExportError(
            f"--verify: {drafts} drafts; the bundle verifies {max(engine.rollback - 1, 0)}.",
            "Build it with --speculate N, or ask for fewer.",
        )
    calls, drafted = VerifyCalls(run.runner, engine.rollback), [[1 + i for i in range(drafts)] for _ in run.slots]

    def step() -> None:
        calls.run(run.slots, drafted)
        for slot in run.slots:
            run.runner.hold(slot, run.runner.context_lens[slot] + drafts + 1)

    return step


def profile_verify(engine: Engine, batch: int, context: int, drafts: int) -> dict[str, Any]:
    run = synthetic_run(engine, batch, context, drafts + 1)
    step = verify_step(engine, run, drafts)
    period = step_period(engine.state_interval, drafts + 1)
    return {"case": f"verify B{batch} {context}, {drafts} drafts each", **profile_steps(engine, step, period)}


def profile_prefill(engine: Engine, batch: int, chunk: int) -> dict[str, Any]:
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


def sizes(texts: list[str]) -> list[tuple[int, ...]]:
    return [tuple(map(int, t.split(":"))) for t in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--cases", nargs="*", default=["1:1024", "64:1024"], help="decode: BATCH:CONTEXT")
    parser.add_argument("--verify", nargs="*", default=[], help="BATCH:CONTEXT:DRAFTS")
    parser.add_argument("--prefill", nargs="*", default=[], help="BATCH:CHUNK")
    parser.add_argument("--rows", type=int, default=16, help="kernels to print a case")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for bundle in args.bundles:
        engine, _ = load_engine(bundle)
        profiles: list[tuple[Callable[..., dict[str, Any]], list[str]]] = [
            (profile_decode, args.cases),
            (profile_verify, args.verify),
            (profile_prefill, args.prefill),
        ]
        for profile, cases in profiles:
            for case in sizes(cases):
                results.append({"bundle": bundle.name, **profile(engine, *case)})
                show(bundle.name, results[-1], args.rows)
                free_cached(engine.device)
                if args.output:
                    write_result(args.output, {"results": results})
        del engine


if __name__ == "__main__":
    main()
