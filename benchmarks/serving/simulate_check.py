r"""`jet-export simulate` against what a server did: the requests of an earlier result, simulated from a bench table.

    python benchmarks/serving/simulate_check.py benchmarks/results/h200/workload-jet-2b-bf16.json \
        --measured jet_export/data/measured/h200/bench-latency-jet-2b-bf16.json
    python benchmarks/serving/simulate_check.py RESULT.json BUNDLE --measured DIR/bench.json --output check.json

RESULT is workload.py's, requests that are there at the start, or serve_load.py's, of which the Poisson parts are
simulated. Their requests depend on the seed alone, so they are drawn again, and run on one simulated replica. Printed
beside each other: what was measured, what was simulated, and the difference. Measure both with the same version.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import serve_load
import workload
from load_workload import Workload
from serving_options import serving_of

from jet_export.bench.ideal import Speeds
from jet_export.bundle.limits import Limits
from jet_export.runtime.capacity import Serving
from jet_export.simulate.cluster import Cluster, ClusterPlan
from jet_export.simulate.engine import PlannedEngine, bundle_engine, model_engine
from jet_export.simulate.load import Arrival
from jet_export.simulate.measures import summary
from jet_export.utils.environment import write_result


def poisson_rows(result: dict[str, Any], engine: PlannedEngine, overhead: float) -> list[dict[str, Any]]:
    """Each Poisson part of a serve_load.py result."""
    sys.argv = ["serve_load.py", *shlex.split(result["command"])[2:]]
    args = serve_load.parse()
    model, _ = engine.model(serving_of(args), overhead)
    limits, speeds = (
        engine.limits,
        Speeds(step_ms={1: 1.0}, held_tokens=1, prompt_tokens_per_s=1.0, prompt_shape=(1, 1)),
    )
    work = Workload(args, engine.config.vocab_size, limits.max_seq_len, speeds, limits.max_batch_size)
    out = []
    for part in result["poisson"]:
        requests = work.requests(part["requests"], 10**6)
        rng, now, load = random.Random(f"{args.seed} {part['load']}"), 0.0, []
        for r in requests:
            load.append(Arrival(now, len(r.prompt), r.new))
            now += rng.expovariate(part["rate"])
        found = summary(Cluster(model, ClusterPlan(replicas=1)).serve(load))
        row: dict[str, Any] = {"part": f"load {part['load']}, {part['rate']:.1f} requests/s"}
        for name in ("ttft_ms", "tpot_ms"):
            row |= {f"{name} {p}": compared(part[name][p], found[name][p]) for p in ("p50", "p95", "p99")}
        out.append(row)
    return out


def burst_rows(result: dict[str, Any], engine: PlannedEngine, overhead: float) -> list[dict[str, Any]]:
    """The greedy requests of a workload.py result, through AsyncLLM: all there at the start."""
    serving = Serving(slots=result["slots"], prefix_cache_bytes=0, max_waiting=result["requests"], wait_timeout=1e9)
    model, _ = engine.model(serving, overhead)
    load = [Arrival(0.0, len(prompt), new) for prompt, new in workload.requests(result["requests"])]
    assert sum(a.prompt for a in load) == result["prompt_tokens"]
    found = summary(Cluster(model, ClusterPlan(replicas=1)).serve(load))
    measured = next(r for r in result["rows"] if r["kind"] == "greedy" and r["through"] == "async")
    return [
        {
            "part": f"{len(load)} requests at once, {result['slots']} slots",
            "tokens/s": compared(measured["tokens_per_s"], found["tokens_per_s"]),
            "ttft_ms p50": compared(measured["ttft_ms_p50"], found["ttft_ms"]["p50"]),
        }
    ]


def rows_of(result: dict[str, Any], engine: PlannedEngine, overhead: float = 0.0) -> list[dict[str, Any]]:
    return (poisson_rows if "poisson" in result else burst_rows)(result, engine, overhead)


def compared(measured: float, simulated: float) -> dict[str, float]:
    return {"measured": measured, "simulated": simulated, "off": simulated / measured - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: the model and the limits in the result")
    parser.add_argument("--fp8", action="store_true", help="without a bundle")
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--step-overhead-us", type=float, default=0.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    if args.bundle:
        engine = bundle_engine(args.bundle, args.measured)
    else:
        limits = Limits(**result["limits"])
        name = result.get("model") or result["bundle"].rsplit("-", 1)[0]
        engine = model_engine(name, fp8=args.fp8, limits=limits, measured=args.measured)
    _, fit = engine.model(Serving())
    print("\n".join(fit.lines()))
    found = rows_of(result, engine, 1e-6 * args.step_overhead_us)
    for row in found:
        print(row["part"])
        for name, v in row.items():
            if isinstance(v, dict):
                print(f"  {name:12} measured {v['measured']:9.2f}  simulated {v['simulated']:9.2f}  {v['off']:+.0%}")
    if args.output:
        write_result(args.output, {"of": args.result.name, "rows": found})


if __name__ == "__main__":
    main()
