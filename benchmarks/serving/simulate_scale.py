"""How long `jet-export simulate` takes for a large load, in CPU seconds of one core and in seconds of the clock.

    python benchmarks/serving/simulate_scale.py --requests 1000000 --replicas 1000 --output RESULT.json

The load is 40 requests a second for each replica, of a JetBlock model in FP8 at 64 sequences at once; nothing is shared
between prompts. What is asked: a million requests over 1,000 replicas in ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from jet_export.bundle.limits import Limits
from jet_export.runtime.capacity import Serving
from jet_export.simulate.command import SimulateOptions, run_simulate
from jet_export.simulate.engine import model_engine
from jet_export.simulate.load import Lengths, Poisson
from jet_export.utils.environment import write_result

RATE = 40.0  # requests a second and replica


def run(requests: int, replicas: int, router: str) -> dict[str, Any]:
    start, cpu, load = time.monotonic(), time.process_time(), os.getloadavg()[0]
    engine = model_engine("jet-2b", fp8=True, limits=Limits(max_batch_size=64, max_seq_len=4096, prefill_chunk=2048))
    prompt, output = Lengths(mean=1024), Lengths(mean=128)
    arrivals = Poisson(rate=RATE * replicas, requests=requests, prompt=prompt, output=output).draw()
    options = SimulateOptions(
        engine=engine,
        serving=Serving(),
        load=arrivals,
        load_name=f"{requests} requests at random",
        replicas=replicas,
        slo=None,
        router=router,
    )
    found = run_simulate(options, print)
    return {
        "requests": requests,
        "replicas": replicas,
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - cpu,
        "cores": os.cpu_count(),
        "load_before": load,
        "summary": found["summary"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=1_000)
    parser.add_argument("--router", default="least")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = run(args.requests, args.replicas, args.router)
    print(f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of CPU time")
    if args.output:
        write_result(args.output, found)


if __name__ == "__main__":
    main()
