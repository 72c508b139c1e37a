"""Times the kernels' configurations on this GPU and writes the best into kernels/configs.json, as rules of its SM.

    python benchmarks/kernels/tune.py [--ops attention_decode,...] [--models 2b,4b] [--minutes 20] [--jobs 8] [--write]

For each op and model, every candidate is first compared with the configuration in use (which the tests hold to the
reference): one that does not compile, does not fit or differs by more than rounding is left out. The others are timed
in turn, as CUDA graphs, on the op's workloads; a candidate's score is the geometric mean of its time over that of the
configuration in use. A rule is written only for a candidate that is faster by MIN_GAIN. Without --write the table stays
as it is and the rules are only printed. All times: benchmarks/results/<gpu>/tune.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import ROOT, lacks_gpu, output_of, parser_of
from candidates import CANDIDATES, GEMV_SIZES, STATIC_CONV

from jet_export.bench import timer
from jet_export.kernels import configs
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.utils.environment import write_result

MIN_GAIN = 0.03
ROUNDING = 2**-7  # relative difference of two correct bf16 results
HEADS = {"2b": (12, 2), "4b": (16, 2), "qwen3-1.7b": (16, 8), "qwen3.5-2b": (8, 2)}
HEAD_DIM = {"qwen3.5-2b": (256, 64)}  # of attention, and how much of it is rotated; else 128
DELTA = {"2b": (12, 96, 256), "4b": (16, 128, 256)}
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


Workloads = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]  # what is timed; the same on copied states


@dataclass
class Task:
    """One rule to find: an op, the sizes it would hold for, and what is run to time it."""

    op: str
    model: str
    where: dict[str, Any]
    workloads: Workloads
    times: dict[str, dict[str, float]] = field(default_factory=dict)  # configuration -> workload -> ms
    left_out: dict[str, str] = field(default_factory=dict)  # configuration -> why

    @property
    def candidates(self) -> list[dict[str, int]]:
        return STATIC_CONV if self.where.get("static") else CANDIDATES[self.op]


def key_of(use: dict[str, int]) -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(use.items()))


def geometric_mean_ratio(times: dict[str, float], base: dict[str, float]) -> float:
    return math.exp(sum(math.log(times[w] / base[w]) for w in base) / len(base))


def choose(times: dict[str, dict[str, float]], in_use: str) -> tuple[str, float]:
    """(the configuration to use, its time relative to the one in use): the latter unless another gains MIN_GAIN."""
    scores = {key: geometric_mean_ratio(t, times[in_use]) for key, t in times.items()}
    best = min(scores, key=lambda key: scores[key])
    return (best, scores[best]) if scores[best] <= 1 - MIN_GAIN else (in_use, 1.0)


def merge(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with new rules: each replaces one of the same op, SM and conditions, or comes before the others."""
    out = list(rows)
    for rule in new:
        same = [i for i, r in enumerate(out) if all(r[k] == rule[k] for k in ("op", "sm", "where"))]
        if same:
            out[same[0]] = rule
        else:
            first = next((i for i, r in enumerate(out) if r["op"] == rule["op"]), len(out))
            out.insert(first, rule)
    configs.parse(out)
    return out


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """One rule a line."""
    tmp = path.with_suffix(".tmp")
    tmp.write_text("[\n" + ",\n".join(" " + json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")
    tmp.replace(path)


# ---------------------------------------------------------------------------------------------------- workloads


def block_tasks(model: str) -> list[Task]:
    from block_cases import block_inputs

    _, K, V = DELTA[model]
    prefills = {f"prefill B{b} T{t}": block_inputs([t] * b, model) for b, t in ((1, 16384), (16, 2048), (1, 2048))}

    def run(sets: list[tuple], decode: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
        op, args = torch.ops.jet.jet_block, sets[0]
        conv, state = (x.clone() for x in args[6:8])  # what is timed changes its own
        return (
            lambda: [op(*a, decode, *NO_BUFFER, None) for a in sets],
            lambda: op(*args[:6], conv.clone(), state.clone(), *args[8:], decode, *NO_BUFFER, None),
        )

    prefill = {name: run([args], False) for name, args in prefills.items()}
    tasks = [
        Task("dynamic_conv", model, {"dtype": "bfloat16", "conv_size": 4, "static": False}, prefill),
        Task("delta_rule_prepare", model, {"dtype": "bfloat16", "head_k_dim": K}, prefill),
        *(
            Task(
                "delta_rule_scan",
                model,
                {"dtype": "bfloat16", "head_k_dim": K, "many_heads": many},
                {n: f for n, f in prefill.items() if many == ("B16" in n)},
            )
            for many in (False, True)
        ),
        Task("gated_rms_norm", model, {"dtype": "bfloat16", "head_v_dim": V}, prefill),
    ]
    for state in (FP32, BF16):
        where = {"state_dtype": str(state).removeprefix("torch."), "head_k_dim": K, "head_v_dim": V, "held": False}
        # Layers one after the other, as in a model: a graph of one launch would show its own start.
        sets = {
            f"decode B{b}": [block_inputs([1] * b, model, state, context=4) for _ in range(8)] for b in (1, 64, 128)
        }
        tasks.append(Task("delta_rule_decode", model, where, {n: run(a, True) for n, a in sets.items()}))
    return tasks


def static_conv_tasks(model: str) -> list[Task]:
    """The op alone, over the columns of a Gated DeltaNet's projection."""
    from block_cases import PREFILL, block_inputs

    workloads: Workloads = {}
    for B, T in PREFILL:
        args = block_inputs([T] * B, model)
        kappa, state = args[2], args[6]
        inputs = args[0][:, : state.shape[2]], kappa, state, *args[8:11]
        workloads[f"prefill B{B} T{T}"] = (partial(torch.ops.jet.dynamic_conv, *inputs),) * 2  # contexts are 0
    return [Task("dynamic_conv", model, {"dtype": "bfloat16", "conv_size": 4, "static": True}, workloads)]


def gemv_tasks(model: str) -> list[Task]:
    tasks = []
    for N, K in GEMV_SIZES.values() if model == "2b" else ():
        for dtype in (BF16, FP8):
            weights = [
                torch.randn(N, K, device="cuda", dtype=BF16).to(dtype) for _ in range(max(1, int(1e8 / (N * K))))
            ]
            x = torch.randn(1, K, device="cuda", dtype=BF16).to(dtype)

            def run(weights: list[torch.Tensor] = weights, x: torch.Tensor = x) -> torch.Tensor:
                return [torch.ops.jet.gemv(x, w, *[None] * 6, 0.0, False, False, BF16, []) for w in weights][-1]

            name = str(dtype).removeprefix("torch.")
            where = {"dtype": name, "out_features": N, "in_features": K}
            tasks.append(Task("gemv", model, where, {f"{N} x {K}": (run, run)}))
    return tasks


def attention_tasks(model: str) -> list[Task]:
    import kernels_attention as attention

    heads, (head_dim, rotary) = HEADS[model], HEAD_DIM.get(model, (128, 128))
    tasks: list[Task] = []
    for cache in (BF16, FP8):
        name = str(cache).removeprefix("torch.")
        where = {"dtype": "bfloat16", "cache_dtype": name, "head_dim": head_dim, "group": heads[0] // heads[1]}
        make = partial(attention.make, heads=heads, cache_dtype=cache, head_dim=head_dim, rotary=rotary)
        prefills = {f"B{b} T{t}": make(b, t, 0) for b, t in ((1, 16384), (16, 2048))}
        decodes = {f"B{b} {n}": make(b, 1, n - 1) for b, n in ((1, 4096), (64, 4096), (1, 65536), (32, 65536))}
        # The cache needs no copy: every call appends the same keys at the same positions.
        prefill: Workloads = {n: (partial(attention.prefill, a),) * 2 for n, a in prefills.items()}
        decode: Workloads = {n: (partial(attention.decode, a),) * 2 for n, a in decodes.items()}
        rope = {"dtype": "bfloat16", "cache_dtype": name, "head_dim": head_dim}
        tasks += [
            Task("attention_decode", model, where, decode),
            Task("attention_prefill", model, where, prefill),
            Task("rope_append", model, rope, prefill),
        ]
    return tasks


# ---------------------------------------------------------------------------------------------------- timing


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def tune(task: Task, deadline: float, repeats: int = 15) -> None:
    """Fills `times` and `left_out`; candidates beyond the deadline are left out."""
    in_use = current(task)
    candidates = [in_use, *(c for c in task.candidates if c != in_use)]
    expected: dict[str, torch.Tensor] = {}
    runs: dict[str, dict[str, Callable[[], Any]]] = {}
    for use in candidates:
        key = key_of(use)
        if time.monotonic() > deadline and use is not in_use:
            task.left_out[key] = "no time left"
            continue
        try:
            with configs.override(task.op, use):
                for name, (_, check) in task.workloads.items():
                    got = check()
                    expected.setdefault(name, got.clone())
                    if not differs(got, expected[name]) <= ROUNDING:
                        raise ValueError(f"{name}: result off by {differs(got, expected[name]):.1e}")
                runs[key] = {name: timer.capture(run) for name, (run, _) in task.workloads.items()}
        except Exception as e:
            if use is in_use:
                raise
            task.left_out[key] = f"{type(e).__name__}: {str(e)[:160]}"
    for name in task.workloads:
        for key, timing in timer.compare({k: r[name] for k, r in runs.items()}, repeats=repeats).items():
            task.times.setdefault(key, {})[name] = timing.median


def makers(model: str, ops: list[str]) -> list[Callable[[str], list[Task]]]:
    """Those that make tasks of these ops: inputs take memory."""
    out: list[Callable[[str], list[Task]]] = []
    if model in DELTA and any(op.startswith(("delta_rule", "dynamic", "gated")) for op in ops):
        out.append(block_tasks)
    if model.startswith("qwen3.5") and "dynamic_conv" in ops:
        out.append(static_conv_tasks)
    if any(op.startswith(("attention", "rope")) for op in ops):
        out.append(attention_tasks)
    return [*out, gemv_tasks] if "gemv" in ops else out


def compile_ahead(options: argparse.Namespace) -> None:
    """Fill Triton's cache: compiling is most of the time, and a process compiles one kernel at a time."""
    command = [sys.executable, __file__, "--ops", options.ops, "--models", options.models, "--compile"]
    running = [subprocess.Popen([*command, f"{i}/{options.jobs}"]) for i in range(options.jobs)]
    for process in running:
        process.wait()


def compile_share(models: list[str], ops: list[str], first: int, step: int) -> None:
    """Run every `step`-th candidate once; those that fail are left to `tune`."""
    tasks = [t for m in models for make in makers(m, ops) for t in make(m) if t.op in ops]
    for task, use in [(t, use) for t in tasks for use in t.candidates][first::step]:
        with suppress(Exception), configs.override(task.op, use):
            next(iter(task.workloads.values()))[1]()
    torch.cuda.synchronize()


def current(task: Task) -> dict[str, int]:
    return dict(configs.find(configs.table(), task.op, configs.current_sm(), task.where).use)


def rule_of(task: Task, sm: int, source: str) -> tuple[dict[str, Any] | None, float]:
    """The rule that the times ask for, None where what is in use stays; and its relative time."""
    in_use = key_of(current(task))
    best, ratio = choose(task.times, in_use)
    if best == in_use:
        return None, 1.0
    use = next(c for c in task.candidates if key_of(c) == best)
    return {"op": task.op, "sm": sm, "where": task.where, "use": use, "source": source}, ratio


def main() -> int:
    parser = parser_of(__doc__, "tune")
    parser.add_argument("--ops", default=",".join(configs.OPS))
    parser.add_argument("--models", default="2b,4b")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile the candidates beforehand")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # I/N: every N-th candidate from the I-th, and stop
    parser.add_argument("--write", action="store_true", help="change kernels/configs.json")
    options = parser.parse_args()
    ops = options.ops.split(",")
    unknown = [op for op in ops if op not in configs.OPS] + [m for m in options.models.split(",") if m not in HEADS]
    if unknown:
        print(f"{unknown[0]}: not known. Ops: {', '.join(configs.OPS)}. Models: {', '.join(HEADS)}.", file=sys.stderr)
        return 2
    if lacks_gpu("tune.py"):
        return 2
    if options.compile:
        compile_share(options.models.split(","), ops, *map(int, options.compile.split("/")))
        return 0
    if options.jobs:
        compile_ahead(options)
    sm = configs.current_sm()
    assert sm is not None
    output = output_of(options)
    source = str(output.resolve().relative_to(ROOT)) if output.resolve().is_relative_to(ROOT) else output.name
    deadline = time.monotonic() + 60 * options.minutes
    torch.manual_seed(0)
    rules: list[dict[str, Any]] = []
    done: list[dict[str, Any]] = []
    for model in options.models.split(","):
        for make in makers(model, ops):
            for task in make(model):
                if task.op not in ops or any((r["op"], r["where"]) == (task.op, task.where) for r in done):
                    continue
                tune(task, deadline)
                rule, ratio = rule_of(task, sm, source)
                rules += [rule] if rule else []
                figures = {"times_ms": task.times, "left_out": task.left_out, "rule": rule, "ratio": ratio}
                done.append({"op": task.op, "model": model, "where": task.where, "in_use": current(task), **figures})
                change = f"{key_of(rule['use'])}, {1 - ratio:.1%} less time" if rule else "stays"
                print(f"{model} {task.op} {task.where}: {change} ({len(task.left_out)} left out)", flush=True)
                write_result(output, {"sm": sm, "min_gain": MIN_GAIN, "tasks": done})
    if options.write and rules:
        write_table(configs.TABLE, merge(json.loads(configs.TABLE.read_text()), rules))
        print(f"{len(rules)} rules of SM {sm} written to {configs.TABLE}: run the GPU tests before committing them")
    elif rules:
        print("not written (--write):\n" + "\n".join(json.dumps(r) for r in rules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
