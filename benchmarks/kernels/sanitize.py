"""Every kernel under compute-sanitizer, memcheck and racecheck, with poisoned outputs.

    python benchmarks/kernels/sanitize.py [--tools memcheck,racecheck] [--only attention] [--output FILE]

The problems are kernel_problems.py's, in the heads and dtypes of jet-2b and jet-4b. Each problem is
a child process of its own under each tool, --processes side by side: outputs and workspaces start as NaN, results are
compared with the reference, and torch's caching allocator is off, so that every tensor is an allocation of its own and
a read past its end is seen. Kernels are compiled before, without a tool. compute-sanitizer comes with the CUDA toolkit:
on the PATH, in $CUDA_HOME, or named by --sanitizer or $COMPUTE_SANITIZER. The plugins under hostile inputs:
hostile_enqueues.py. Exit status 0: no error and every result right; 1 otherwise; 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arguments import output_of, parser_of

BOUND = 2e-2  # of bf16 results; what is looked for here is memory, and a NaN
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:error|hazard)")


def run_problems(only: str, device: str, large: bool, part: int = 0, parts: int = 1) -> int:
    """The child: a line a problem, of every `parts`-th one; exit status 1 where one is wrong."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from helpers.kernel_problems import error_of, every_problem

    wrong = 0
    for name, problem in [(n, p) for n, p in every_problem(device, large).items() if only in n][part::parts]:
        error = error_of(problem)
        ok = error <= BOUND  # false for NaN
        wrong += not ok
        print(f"problem {name}: error {error:.1e} {'ok' if ok else 'WRONG'}", flush=True)
    return 1 if wrong else 0


def summary_of(output: str) -> int | None:
    """Errors or hazards that the tool counted; None where it gave no summary."""
    found = SUMMARY.findall(output)
    return int(found[-1]) if found else None


def run_part(sanitizer: str, tool: str, only: str, seconds: float, part: int, parts: int) -> tuple[int, str]:
    """Exit status, -1 where time ran out, and output of one child under the tool."""
    child = [sys.executable, __file__, "--problems", "--only", only, "--part", f"{part}/{parts}"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *child]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as e:
        pieces = (p.decode(errors="replace") if isinstance(p, bytes) else p or "" for p in (e.stdout, e.stderr))
        return -1, "".join(pieces)


def run_tool(
    sanitizer: str, tool: str, only: str, names: list[str], seconds: float, processes: int = 1
) -> dict[str, object]:
    """One tool over the problems `names`, each in a child of its own, so many side by side. `clean` only if the tool
    said so of each of them, and every result is right. What has not ended after `seconds` is listed as unfinished."""
    begin = time.monotonic()

    def run(i: int) -> tuple[int, str]:
        left = begin + seconds - time.monotonic()
        return run_part(sanitizer, tool, only, left, i, len(names)) if left > 0 else (-1, "")

    with ThreadPoolExecutor(processes) as pool:
        runs = list(pool.map(run, range(len(names))))
    found = [re.findall(r"^problem (.*)$", output, re.M) for _, output in runs]
    counts = [summary_of(output) for _, output in runs]
    unfinished = [n for n, (status, _), e in zip(names, runs, counts, strict=True) if status == -1 or e is None]
    problems = [p for part in found for p in part]
    right = len(problems) == len(names) and not any(p.endswith("WRONG") for p in problems)
    errors = sum(e for e in counts if e is not None)
    statuses = [status for status, _ in runs]
    clean = bool(names) and not any(statuses) and not unfinished and errors == 0 and right
    reports = [line for _, output in runs for line in output.splitlines() if line.startswith("=========")]
    return {
        "tool": tool,
        "clean": clean,
        "errors": errors,
        "exit_status": next((s for s in statuses if s), 0),
        "unfinished": unfinished,
        "processes": processes,
        "problems": problems,
        "seconds": round(time.monotonic() - begin, 1),
        "reports": [] if clean else reports[:60],
    }


def names_of(only: str, processes: int, device: str = "cuda") -> list[str] | None:
    """Names of the problems, in their order, once each has run without a tool, which compiles the kernels; None where
    one is wrong."""
    child = [sys.executable, __file__, "--problems", "--only", only, "--device", device]

    def run(i: int) -> list[str] | None:
        done = subprocess.run([*child, "--part", f"{i}/{processes}"], stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        return re.findall(r"^problem (.*): error", done.stdout, re.M) if done.returncode == 0 else None

    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(run, range(processes)))
    sizes = [len(p) for p in parts if p is not None]
    if len(sizes) < len(parts):
        return None
    return [p[i] for i in range(max(sizes)) for p in parts if p is not None and i < len(p)]


def main() -> int:
    parser = parser_of(__doc__, "sanitize")
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--seconds", type=float, default=900, help="of each tool")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--problems", action="store_true", help="run the problems here, under no tool")
    parser.add_argument("--device", default="cuda", help="with --problems; cpu: small ones, by Triton's interpreter")
    parser.add_argument("--processes", type=int, default=4, help="side by side")
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)  # I/N: with --problems, every N-th, from I on
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.problems:
        part, parts = map(int, options.part.split("/"))
        return run_problems(options.only, options.device, options.device != "cpu", part, parts)
    unknown = [t for t in options.tools.split(",") if t not in TOOLS]
    if unknown:
        print(f"--tools {unknown[0]}: not known. Known: {', '.join(TOOLS)}.", file=sys.stderr)
        return 2
    if options.processes < 1:
        print(f"--processes {options.processes}: must be at least 1.", file=sys.stderr)
        return 2
    from cuda_tools import find

    sanitizer = find("compute-sanitizer", options.sanitizer or os.environ.get("COMPUTE_SANITIZER"))
    if sanitizer is None:
        print(
            "compute-sanitizer is not on the PATH nor in $CUDA_HOME/bin: it comes with the CUDA toolkit.",
            file=sys.stderr,
        )
        return 2
    from jet_export.utils.environment import write_result

    names = names_of(options.only, options.processes)
    if names is None:
        print("wrong without any tool: see above", file=sys.stderr)
        return 1
    if not names:
        print(f"--only {options.only}: no problem's name contains it.", file=sys.stderr)
        return 2
    results = []
    for tool in options.tools.split(","):
        results.append(run_tool(sanitizer, tool, options.only, names, options.seconds, options.processes))
        r = results[-1]
        verdict = "clean" if r["clean"] else f"NOT CLEAN: {r['errors']} errors, exit status {r['exit_status']}"
        verdict += f", not finished: {', '.join(r['unfinished'])}" if r["unfinished"] else ""  # type: ignore[arg-type]
        print(f"{tool}: {verdict}; {len(r['problems'])} problems in {r['seconds']} s", flush=True)  # type: ignore[arg-type]
        write_result(output_of(options), {"results": results})
    return 0 if all(r["clean"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
