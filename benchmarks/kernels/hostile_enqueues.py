"""The plugins on meaningless batch tensors, under compute-sanitizer and timed; needs a GPU.

    python benchmarks/kernels/hostile_enqueues.py [--fetch-headers] [--output FILE]

A TensorRT builder may time plugins on whatever lies in memory. Each plugin of jet-2b and jet-4b (bf16 and FP8 cache) is
enqueued with random, negative, huge and falling cu_seqlens, slots, context_lens and block_table. Two passes, a process
each: memcheck, every tensor an allocation of its own; then timed against the same sizes at their longest valid context,
of which a hostile call may take N + 1 times as long. compute-sanitizer: of the CUDA toolkit, on PATH or in CUDA_HOME,
or COMPUTE_SANITIZER names it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from arguments import output_of, parser_of
from cuda_tools import find

from jet_export.ladder.inputs import HOSTILE, attributes_of, node_of, random_inputs
from jet_export.model.hub import PRESETS
from jet_export.plugins.cases import label, model_cases
from jet_export.plugins.harness.build import harness_library
from jet_export.plugins.harness.nodes import PluginNode
from jet_export.plugins.harness.objects import Harness
from jet_export.plugins.headers import headers_for
from jet_export.plugins.library import NAME, build_library
from jet_export.utils.environment import write_result
from jet_export.utils.errors import JetExportError

SIZES = {"prefill": [64, 1, 130, 61], "decode": [1] * 8}
LONGEST = 2048  # tokens held in the valid runs that hostile ones are timed against
TIMES = 5
ERROR_EXIT = 9


def plugins(headers: Path) -> tuple[Harness, list]:
    major, minor = torch.cuda.get_device_capability()
    caches = ["bfloat16", "float8_e4m3fn"] if (major, minor) >= (8, 9) else ["bfloat16"]
    cases = [
        c
        for model in ("jet-2b", "jet-4b")
        for cache in caches
        for c in model_cases(PRESETS[model](), cache_dtype=cache)
    ]
    cases = list(dict.fromkeys(cases))
    folder = build_library(cases, [10 * major + minor], headers, emit=print)
    return Harness(harness_library(headers), folder / NAME), cases


def milliseconds(call: Any) -> float:
    """The shortest of a few runs."""
    found = []
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return min(found)


def enqueue_all(headers: Path, timed: bool, seeds: int) -> list[dict[str, Any]]:
    """Every plugin, form and kind of input; raises on a CUDA error."""
    harness, cases = plugins(headers)
    rows = []
    for case in cases:
        node = PluginNode(harness, node_of(case), attributes_of(case))
        for form, lens in SIZES.items():
            inputs = random_inputs(case, lens, [LONGEST - n for n in lens], "cuda")
            (dtype, shape), *_ = node.output_shapes(inputs.tensors)
            o = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
            workspace = node.workspace(inputs.tensors)

            def call(given: Any, node=node, o=o, workspace=workspace) -> None:
                node.enqueue(given.tensors, [o, *given.states()], workspace)

            call(inputs)
            torch.cuda.synchronize()
            row: dict[str, Any] = {"plugin": label(case), "form": form, "sequences": len(lens), "calls": 0}
            if timed:
                row["valid_ms"] = milliseconds(lambda call=call, given=inputs: call(given))
            worst = 0.0
            for seed in range(seeds):
                for kind in HOSTILE:
                    given = inputs.hostile(kind, seed)
                    torch.cuda.synchronize()
                    if timed:
                        worst = max(worst, milliseconds(lambda call=call, given=given: call(given)))
                    else:
                        call(given)
                        torch.cuda.synchronize()
                    row["calls"] += 1
            if timed:
                row["hostile_ms"] = worst
                row["bounded"] = worst <= (len(lens) + 1) * row["valid_ms"] + 0.05
            rows.append(row)
        node.close()
    return rows


def find_sanitizer() -> str:
    found = find("compute-sanitizer", os.environ.get("COMPUTE_SANITIZER"))
    if found is None:
        raise JetExportError(
            "compute-sanitizer was not found.",
            "Install the CUDA toolkit, which holds it, or name it in COMPUTE_SANITIZER.",
        )
    return found


def child(command: list[str], env: dict[str, str], arguments: list[str]) -> tuple[int, str, list[dict[str, Any]]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        script = [sys.executable, __file__, "--child", file.name, *arguments]
        done = subprocess.run([*command, *script], env=os.environ | env, capture_output=True, text=True)
        text = Path(file.name).read_text()
        return done.returncode, done.stdout + done.stderr, json.loads(text) if text else []


def memcheck(sanitizer: str, arguments: list[str]) -> dict[str, Any]:
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", str(ERROR_EXIT), "--target-processes", "all"]
    status, said, rows = child(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, [*arguments, "--seeds", "2"])
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", said)
    errors = sum(map(int, summary)) if summary else None
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1:]
    return {
        "tool": version,
        "errors": errors,
        "passed": status == 0 and errors == 0,
        "rows": rows,
        "said": [] if status == 0 else said.strip().splitlines()[-40:],
    }


def main() -> int:
    parser = parser_of(__doc__, "hostile-enqueues")
    parser.add_argument("--tensorrt-headers", default=None)
    parser.add_argument("--fetch-headers", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if not torch.cuda.is_available():
        raise JetExportError("hostile_enqueues: needs a CUDA GPU, and torch sees none.")
    headers = headers_for(o.tensorrt_headers, o.fetch_headers)
    if o.child:
        Path(o.child).write_text(json.dumps(enqueue_all(headers, o.timed, o.seeds)))
        return 0
    sanitizer = find_sanitizer()
    plugins(headers)  # compiles what the children find in the cache
    arguments = ["--tensorrt-headers", str(headers)]
    status, said, rows = child([], {}, [*arguments, "--timed", "--seeds", str(o.seeds)])
    timed = {
        "passed": status == 0 and all(row["bounded"] for row in rows),
        "rows": rows,
        "said": [] if status == 0 else said.strip().splitlines()[-40:],
    }
    output = output_of(o)
    checked = memcheck(sanitizer, arguments)
    passed = bool(timed["passed"] and checked["passed"])
    write_result(output, {"passed": passed, "memcheck": checked, "timed": timed})
    print(f"{'PASSED' if passed else 'FAILED'}: memcheck {checked['errors']} errors; {output}")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JetExportError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
