"""How long `jet-export build --backend tensorrt-rtx` takes, how much memory, and what it builds; no GPU is needed.

    python benchmarks/engine/tensorrt_build.py --model jet-2b --sm 8.9 --output RESULT.json

Random weights, FP8. Memory is the largest sum, over all processes of the build, of their proportional set sizes (pages
that several share count once), looked up four times a second; the plugin library is compiled anew.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jet_export.backends.tensorrt.layers import REPORT, LayerReport, rows
from jet_export.bundle.manifest import Manifest
from jet_export.utils.environment import write_result

INTERVAL = 0.25  # seconds


def process_tree(pid: int) -> list[int]:
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in path.read_text().split() for p in process_tree(int(child))]
        except OSError:  # it has ended
            continue
    return found


def memory(pid: int) -> int:
    """Proportional set size, bytes; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def measure(command: list[str]) -> dict[str, Any]:
    """Runs it; seconds, processor seconds, peak memory, and the stages that it printed."""
    load = os.getloadavg()[0]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(memory(pid) for pid in process_tree(process.pid)))
            time.sleep(INTERVAL)
        log.seek(0)
        text = log.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(text)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stages = {name: float(s) for name, s in re.findall(r"^  (\S.*): ([0-9.]+) s$", text, re.MULTILINE)}
    return {
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(cpu, 1),
        "cores": os.cpu_count(),
        "load_average_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "peak_memory_gb": round(peak / 1e9, 2),
        "stages_s": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="jet-2b")
    parser.add_argument("--sm", default="8.9")
    parser.add_argument("--headers", help="TensorRT's; default those that are found, or fetched")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    build = ["build", "--model", args.model, "--fp8", "--random-weights", "--backend", "tensorrt-rtx", "--sm", args.sm]
    build += ["--tensorrt-headers", args.headers] if args.headers else ["--fetch-headers"]
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "bundle"
        os.environ["JET_EXPORT_CACHE"] = str(Path(directory) / "cache")
        measured = measure([sys.executable, "-m", "jet_export.cli.app", *build, "--output", str(bundle)])
        manifest = Manifest.load(bundle)
        result = {
            "command": "jet-export " + " ".join(build),
            **measured,
            "tensorrt_rtx": manifest.backend["tensorrt-rtx"],
            "verified": manifest.build["verified"],
            "bytes": {name: entry["bytes"] for name, entry in manifest.files.items()},
            "layers_prefill_and_decode": [asdict(row) for row in rows(LayerReport.load(bundle / REPORT))],
        }
    write_result(args.output, result)


if __name__ == "__main__":
    main()
