"""Every kernel under compute-sanitizer, memcheck and racecheck, with poisoned outputs.

    python benchmarks/sanitize.py [--tools memcheck,racecheck] [--only attention] [--output results/sanitize.json]

The problems are kernel_problems.py's, in the heads and dtypes of jet-2b and jet-4b. Each tool runs one child process
over all of them: outputs and workspaces start as NaN, results are compared with the reference, and torch's caching
allocator is off, so that every tensor is an allocation of its own and a read past its end is seen. Kernels are compiled
before, without a tool. compute-sanitizer comes with the CUDA toolkit: on the PATH, in $CUDA_HOME, or named by
--sanitizer or $COMPUTE_SANITIZER. The plugins under hostile inputs: hostile_enqueues.py. Exit status 0: no error and
every result right; 1 otherwise; 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

BOUND = 2e-2  # of bf16 results; what is looked for here is memory, and a NaN
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:error|hazard)")


def run_problems(only: str, device: str, large: bool) -> int:
    """The child: a line a problem; exit status 1 where one is wrong."""
    from kernel_problems import error_of, one_token_problems, problems

    wrong = 0
    for name, problem in {**problems(device, large), **one_token_problems(device, large)}.items():
        if only not in name:
            continue
        error = error_of(problem)
        ok = error <= BOUND  # false for NaN
        wrong += not ok
        print(f"problem {name}: error {error:.1e} {'ok' if ok else 'WRONG'}", flush=True)
    return 1 if wrong else 0


def summary_of(output: str) -> int | None:
    """Errors or hazards that the tool counted; None where it gave no summary."""
    found = SUMMARY.findall(output)
    return int(found[-1]) if found else None


def run_tool(sanitizer: str, tool: str, only: str, seconds: float) -> dict[str, object]:
    """One tool over all problems. `clean` only if it said so, every problem ran, and every result is right."""
    child = [sys.executable, __file__, "--problems", "--only", only]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *child]
    begin = time.monotonic()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as e:
        parts = (p.decode(errors="replace") if isinstance(p, bytes) else p or "" for p in (e.stdout, e.stderr))
        status, output = -1, "".join(parts)
    problems = re.findall(r"^problem (.*)$", output, re.M)
    errors = summary_of(output)
    clean = status == 0 and errors == 0 and bool(problems) and not any(p.endswith("WRONG") for p in problems)
    return {
        "tool": tool, "clean": clean, "errors": errors, "exit_status": status, "timed_out": status == -1,
        "problems": problems, "seconds": round(time.monotonic() - begin, 1),
        "reports": [] if clean else [line for line in output.splitlines() if line.startswith("=========")][:60],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--seconds", type=float, default=900, help="of each tool")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sanitize.json")
    parser.add_argument("--problems", action="store_true", help="run the problems here, under no tool")
    parser.add_argument("--device", default="cuda", help="with --problems; cpu: small ones, by Triton's interpreter")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.problems:
        return run_problems(options.only, options.device, large=options.device != "cpu")
    unknown = [t for t in options.tools.split(",") if t not in TOOLS]
    if unknown:
        print(f"--tools {unknown[0]}: not known. Known: {', '.join(TOOLS)}.", file=sys.stderr)
        return 2
    from cuda_tools import find

    sanitizer = find("compute-sanitizer", options.sanitizer or os.environ.get("COMPUTE_SANITIZER"))
    if sanitizer is None:
        print(
            "compute-sanitizer is not on the PATH nor in $CUDA_HOME/bin: it comes with the CUDA toolkit.",
            file=sys.stderr,
        )
        return 2
    from jet_export import bench

    if subprocess.run([sys.executable, __file__, "--problems", "--only", options.only]).returncode:
        print("wrong without any tool: see above", file=sys.stderr)
        return 1
    results = []
    for tool in options.tools.split(","):
        results.append(run_tool(sanitizer, tool, options.only, options.seconds))
        r = results[-1]
        verdict = "clean" if r["clean"] else f"NOT CLEAN: {r['errors']} errors, exit status {r['exit_status']}"
        print(f"{tool}: {verdict}; {len(r['problems'])} problems in {r['seconds']} s", flush=True)  # type: ignore[arg-type]
        bench.write_result(options.output, {"results": results})
    return 0 if all(r["clean"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
