"""`jet-export simulate` held against a server, in one command: step times, a load, and both beside each other.

    python benchmarks/serving/simulate_truth.py BUNDLE --output DIR [--seconds 60] [--batch 1,8,16,64]

1. `jet-export bench` measures the bundle's steps: DIR/bench.json.
2. serve_load.py serves arrivals at 0.5, 0.8 and 1.1 of the throughput that it has just measured: DIR/serve-load.json.
3. simulate_check.py draws the same requests, simulates them from 1 and compares: DIR/check.json. What is asked: median
   and p99 of TTFT and TPOT within 15 %.

On a GPU that nothing else uses. On a CPU that is shared, --clock cpu counts the process's own time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WITHIN = 0.15
ASKED = [f"{name} {p}" for name in ("ttft_ms", "tpot_ms") for p in ("p50", "p99")]


def commands(args: argparse.Namespace) -> list[list[str]]:
    out, python = args.output, sys.executable
    bundle = str(args.bundle)
    bench = [python, "-m", "jet_export.cli.app", "bench", bundle, "--batch", args.batch, "--contexts", args.contexts]
    load = [python, str(HERE / "serve_load.py"), bundle, "--output", str(out / "serve-load.json")]
    load += ["--prompt-tokens", str(args.prompt_tokens), "--output-tokens", str(args.output_tokens)]
    load += ["--concurrency", args.batch.split(",")[-1], "--loads", "0.5", "0.8", "1.1", "--clock", args.clock]
    load += ["--poisson-seconds", str(args.seconds)]
    check = [python, str(HERE / "simulate_check.py"), str(out / "serve-load.json"), bundle]
    check += ["--measured", str(out / "bench.json"), "--output", str(out / "check.json")]
    check += ["--step-overhead-us", str(args.step_overhead_us)]
    return [[*bench, "--output", str(out)], load, check]


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What is off by more than WITHIN, of the figures that are asked for."""
    return [
        f"{row['part']}: {name} off by {row[name]['off']:+.0%}"
        for row in rows
        for name in ASKED
        if abs(row[name]["off"]) > WITHIN
    ]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", default="1,8,16,64", help="of the steps measured; the largest are served at once")
    parser.add_argument("--contexts", default="128,1k,2k")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals at each load")
    parser.add_argument("--step-overhead-us", type=float, default=0.0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    for command in commands(args):
        print("$", " ".join(command), flush=True)
        subprocess.run(command, check=True)
    off = verdict(json.loads((args.output / "check.json").read_text())["rows"])
    print("\n".join(off) if off else f"median and p99 of TTFT and TPOT are within {WITHIN:.0%}")


if __name__ == "__main__":
    main()
