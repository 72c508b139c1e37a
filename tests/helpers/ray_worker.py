"""Stands in for jet_export/search/worker.py on a node: builds and measures nothing, and says in a log what it does.

    python ray_worker.py LOG build|measure|describe

The first build and the first measurement of a process that LOG.hold names wait until their parent is killed.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HOST: dict[str, Any] = {
    "device": "cpu",
    "arch": "x86_64",
    "fp8": True,
    "usable_bytes": 1 << 40,
    "machine": {"device": "a node", "torch": "2", "triton": "3", "kernels": "0"},
}


def latency(cell: dict[str, Any], batch: int, context: int, phase: str) -> float:
    """Milliseconds: more with layers, batch and context, and by the cell."""
    of_cell = int(hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:6], 16) / (1 << 24)
    return 1 + cell["layers"] * (1 + of_cell) * batch * (context if phase == "prefill" else 1)


def note(log: Path, what: str) -> bool:
    """Write a line; whether to wait for the parent's death: the first of its kind on a raylet that LOG.hold names."""
    raylet = os.environ["RAY_RAYLET_PID"]
    with log.open("a+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        kind, before = what.split()[0], f.read().splitlines()
        f.write(f"{what} {os.getppid()} {raylet}\n")
    hold = Path(f"{log}.hold").read_text().split()  # "measure any build 1234"
    held = dict(zip(hold[::2], hold[1::2], strict=True)).get(kind)
    mine = [line for line in before if line.startswith(kind) and held in ("any", line.split()[-1])]
    return held in ("any", raylet) and not mine


def main() -> None:
    log, work = Path(sys.argv[1]), sys.argv[2]
    for line in sys.stdin:
        task = json.loads(line)
        answer: dict[str, Any] = {}
        if work == "describe":
            answer = {"host": HOST}
        else:
            wait = note(log, f"{work} {hashlib.sha256(json.dumps(task['cell']).encode()).hexdigest()[:16]}")
            while wait and os.getppid() == task["parent"]:
                time.sleep(0.01)
        if work == "build":
            Path(task["bundle"]).mkdir()
            Path(task["bundle"], "manifest.json").write_text(json.dumps(task["cell"]))
        if work == "measure":
            assert json.loads(Path(task["bundle"], "manifest.json").read_text()) == task["cell"]
            answer["entries"] = [
                {
                    "batch": batch,
                    "context": context,
                    "phase": phase,
                    "median_ms": latency(task["cell"], batch, context, phase),
                    "p90_ms": latency(task["cell"], batch, context, phase),
                    "details": {},
                }
                for batch, context in task["cases"]
                for phase in ("decode", "prefill")
            ]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
