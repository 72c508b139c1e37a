"""What the kernels wait for: Nsight Compute's counters of every kernel of a JetBlock, as a table and JSON.

    python benchmarks/kernels/ncu_kernels.py [--models 2b,4b] [--output FILE]

For each kernel: time, bytes moved to and from memory and their rate, registers, resident warps, how busy the tensor
cores are, and the reasons for which warps stall, the largest first (cycles a warp waits per instruction it issues). ncu
comes with the CUDA toolkit: on the PATH, in $CUDA_HOME/bin, or named by --ncu. Its times are of kernels run alone at
the clocks of the moment; kernels.py's are the ones to quote.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from typing import Any

from arguments import output_of, parser_of

from jet_export.kernels.state_layout import NO_BUFFER

STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes.sum",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_dynamic",
    "warps_active_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_pct": "smsp__issue_active.avg.pct_of_peak_sustained_active",
}
REASONS = ("long_scoreboard", "short_scoreboard", "barrier", "wait", "gmma", "mio_throttle", "lg_throttle",
           "math_pipe_throttle", "membar", "not_selected", "dispatch_stall", "branch_resolve", "sleeping")  # fmt: skip
CASES = [("prefill", [16384]), ("prefill", [2048] * 16), ("decode", [1] * 64)]


def run_cases(models: list[str]) -> None:
    """The child: every case once between the profiler's start and stop."""
    import torch
    from block_cases import block_inputs

    for model in models:
        for form, lens in CASES:
            args = block_inputs(lens, model, context=4)
            for profiled in (False, True):
                if profiled:
                    torch.cuda.profiler.start()
                torch.ops.jet.jet_block(*args, form == "decode", *NO_BUFFER, None)
                torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def names_of_cases(models: list[str]) -> list[str]:
    return [f"{m} {form} B{len(lens)} T{lens[0]}" for m in models for form, lens in CASES]


def number(text: str, unit: str) -> float:
    """A value in bytes, microseconds or as it is."""
    scale = {
        "Kbyte": 1e3,
        "Mbyte": 1e6,
        "Gbyte": 1e9,
        "nsecond": 1e-3,
        "ns": 1e-3,
        "msecond": 1e3,
        "ms": 1e3,
        "second": 1e6,
        "s": 1e6,
    }
    return float(text.replace(",", "")) * scale.get(unit, 1.0)


def parse(text: str) -> list[dict[str, Any]]:
    """Rows of ncu's --csv --page raw: a header, a row of units, a row a kernel."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    units, *rows = csv.DictReader(lines[begin:])
    out = []
    for row in rows:
        found: dict[str, Any] = {"kernel": row["Kernel Name"].split("(")[0]}
        for name, metric in METRICS.items():
            if row.get(metric):
                found[name] = number(row[metric], units[metric] or "")
        stalls = {m[1]: float(v.replace(",", "")) for k, v in row.items() if k and (m := STALL.match(k)) and v}
        found["stalls"] = dict(sorted(stalls.items(), key=lambda kv: -kv[1])[:5])
        out.append(found)
    return out


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("case", "kernel", "us", "GB", "TB/s", "regs", "warps", "tensor", "issue", "stalls"):
        left = name in ("case", "kernel", "stalls")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for r in rows:
        us, nbytes = r.get("us", 0.0), r.get("dram_bytes", 0.0)
        stalls = ", ".join(f"{k} {v:.1f}" for k, v in list(r["stalls"].items())[:4])
        table.add_row(
            r["case"],
            r["kernel"],
            f"{us:.1f}",
            f"{nbytes / 1e9:.2f}",
            f"{nbytes / max(us, 1e-9) / 1e6:.2f}",
            f"{r.get('registers', 0):.0f}",
            f"{r.get('warps_active_pct', 0):.0f}%",
            f"{r.get('tensor_pct', 0):.0f}%",
            f"{r.get('issue_pct', 0):.0f}%",
            stalls,
        )
    Console(width=190, highlight=False).print(table)


def main() -> int:
    parser = parser_of(__doc__, "ncu")
    parser.add_argument("--models", default="2b,4b")
    parser.add_argument("--ncu", help="path of ncu")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--cases", action="store_true", help="run the cases here, without ncu")
    options = parser.parse_args()
    models = options.models.split(",")
    if options.cases:
        run_cases(models)
        return 0
    from cuda_tools import find

    ncu = find("ncu", options.ncu)
    if ncu is None:
        print("ncu is not on the PATH nor in $CUDA_HOME/bin: it comes with the CUDA toolkit.", file=sys.stderr)
        return 2
    from jet_export.utils.environment import write_result

    metrics = [*METRICS.values(), *(f"smsp__average_warps_issue_stalled_{r}_per_issue_active.ratio" for r in REASONS)]
    child = [sys.executable, __file__, "--cases", "--models", options.models]
    command = [ncu, "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none",
               "--metrics", ",".join(metrics), *child]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds)
    rows = parse(done.stdout)
    if not rows:
        print(
            f"ncu gave no kernels (exit status {done.returncode}): {(done.stdout + done.stderr)[-500:]}",
            file=sys.stderr,
        )
        return 1
    cases, names = iter(names_of_cases(models)), []
    case = ""
    for r in rows:  # a case begins with the first kernel of its launcher
        if r["kernel"] in ("dynamic_conv_kernel", "decode_kernel"):
            case = next(cases, "?")
        names.append(case)
    rows = [{"case": c, **r} for c, r in zip(names, rows, strict=True)]
    write_result(output_of(options), {"kernels": rows})
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
