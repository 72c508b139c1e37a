"""A decode step by CUDA graph, its kernels launched one after the other and by programmatic edges.

    python benchmarks/engine/launch_overlap.py BUNDLE [--batch 1 8 64] [--held 1024] [--output FILE]

Milliseconds a step (medians of --repeats groups of 32 steps, the variants in turns) of sequences that hold --held
tokens, on states of zeros; the logits of both variants must be equal, bit for bit. A bundle for a GPU before SM 9.0 has
no such edges (jet_export/runtime/launch_edges.py).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from mixed_step import runner_of

from jet_export.backends.base import Engine
from jet_export.backends.load import load_engine
from jet_export.runtime.runner import Runner
from jet_export.utils.environment import write_result

STEPS = 32


def group(runner: Runner, slots: list[int], held: int) -> float:
    """Milliseconds of a step, of STEPS in a row."""
    for slot in slots:
        runner.hold(slot, held)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    runner.decode(slots)
    before.record()
    for _ in range(STEPS):
        runner.decode(slots)
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / STEPS


@torch.inference_mode()
def measure(engine: Engine, batch: int, held: int, repeats: int) -> dict[str, Any]:
    runners, logits = {}, []
    for name, overlap in (("plain", False), ("programmatic", engine.dependent_launch)):
        engine.dependent_launch = overlap
        runners[name] = runner_of(engine, batch, held + STEPS + 2, 1)
        slots = list(range(1, batch + 1))
        group(runners[name], slots, held)
        logits.append(runners[name].decode(slots).clone())
    equal = bool(torch.equal(*logits))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            times[name].append(group(runner, slots, held))
    return {"batch": batch, "equal": equal, **{name: round(statistics.median(t), 4) for name, t in times.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--held", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    engine, manifest = load_engine(args.bundle)
    rows = [measure(engine, batch, args.held, args.repeats) for batch in args.batch]
    for row in rows:
        times = ", ".join(f"{name} {row[name]:.3f} ms" for name in ("plain", "programmatic"))
        print(f"B{row['batch']:<4} {times}, equal: {row['equal']}")
    if args.output:
        write_result(args.output, {"model": manifest.model["name"], "held": args.held, "steps": STEPS, "rows": rows})
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
