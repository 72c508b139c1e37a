"""All that is measured on a GPU, in order, each step with a time limit: for a maintainer with one GPU and 30 minutes.

    python benchmarks/tools/gpu_session.py                      # every step that has not passed yet, for 30 minutes
    python benchmarks/tools/gpu_session.py --list
    python benchmarks/tools/gpu_session.py --only kernels,tune --again

Results, logs and session.json (what ran, how long, how it ended) go to --output, bundles to --bundles. A step that
fails or runs out of time does not stop the others; the next call goes on with what has not passed. Commands of one step
run side by side (two builds): such a step times nothing. What a step needs is checked first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jet_export.utils.files import write_atomically

BENCHMARKS = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
CLI = [PYTHON, "-m", "jet_export.cli.app"]
BATCH, TOKENS, CHUNK = "1024", "262400", "2048"  # what the bundles are built for
BUNDLES = {  # name -> build options
    "jet-2b-fp8": ["--model", "jet-2b", "--fp8"],
    "jet-2b-bf16": ["--model", "jet-2b"],
    "fused-jet-2b-fp8": ["--model", "jet-2b", "--fp8", "--kv-cache-dtype", "fp8", "--fuse-decode"],
    "fused-jet-2b-bf16": ["--model", "jet-2b", "--fuse-decode"],
    "jet-4b-fp8": ["--model", "jet-4b", "--fp8"],
    "jet-4b-bf16": ["--model", "jet-4b"],
    "qwen3-1.7b-bf16": ["--model", "qwen3-1.7b"],
    "qwen3-1.7b-fp8": ["--model", "qwen3-1.7b", "--fp8"],
    "interval-1-jet-2b-fp8": ["--model", "jet-2b", "--fp8", "--kv-cache-dtype", "fp8"],
    "interval-8-jet-2b-fp8": ["--model", "jet-2b", "--fp8", "--kv-cache-dtype", "fp8", "--state-interval", "8"],
    "exact-sums-jet-2b-fp8": ["--model", "jet-2b", "--fp8"],
    "fast-sums-jet-2b-fp8": ["--model", "jet-2b", "--fp8", "--fast-accumulation"],
    "speculate-jet-2b-fp8": [
        "--model", "jet-2b", "--fp8", "--kv-cache-dtype", "fp8", "--state-interval", "8", "--speculate", "4"
    ],
    "qwen3.5-2b-bf16": ["--model", "qwen3.5-2b"],
    "qwen3.5-2b-fp8": ["--model", "qwen3.5-2b", "--fp8"],
    "qwen3.5-4b-bf16": ["--model", "qwen3.5-4b"],
    "qwen3.5-4b-fp8": ["--model", "qwen3.5-4b", "--fp8"],
}  # fmt: skip
FAMILIES = ("jet-2b", "jet-4b", "qwen3-1.7b", "qwen3.5")
SUMS = ("exact-sums-jet-2b-fp8", "fast-sums-jet-2b-fp8")
INTERVALS = ("interval-1-jet-2b-fp8", "interval-8-jet-2b-fp8")


@dataclass(frozen=True)
class Step:
    """Commands run side by side, each logged; `seconds` is the limit of all. needs: paths that must exist before."""

    name: str
    what: str
    seconds: float
    commands: dict[str, list[str]]
    needs: tuple[Path, ...] = ()


@dataclass
class Outcome:
    status: str  # "passed", "failed", "timed out", "not run: ..."
    seconds: float = 0.0
    exit_status: dict[str, int | None] = field(default_factory=dict)  # None: killed at the limit
    commit: str = ""


def steps(out: Path, bundles: Path) -> list[Step]:
    """In order of what the next figures depend on."""

    def script(name: str, *args: str | Path | int) -> list[str]:
        return [PYTHON, str(BENCHMARKS / name), *map(str, args)]

    def build(name: str, batch: str = BATCH, tokens: str = TOKENS) -> list[str]:
        return [*CLI, "build", *BUNDLES[name], "--random-weights", "--backend", "inductor",
                "--max-batch-size", batch, "--max-seq-len", tokens, "--prefill-chunk", CHUNK,
                "--output", str(bundles / name)]  # fmt: skip

    def bench(name: str, protocol: str, *args: str | Path, directory: str = "") -> list[str]:
        return [
            *CLI,
            "bench",
            str(bundles / name),
            "--protocol",
            protocol,
            "--output",
            str(out / (directory or f"bench-{protocol}-{name}")),
            *map(str, args),
        ]

    def built(*names: str) -> tuple[Path, ...]:
        return tuple(bundles / n / "manifest.json" for n in names)

    qwen = [x for n in ("qwen3-1.7b-bf16", "qwen3-1.7b-fp8") for x in ("--baseline", bundles / n)]
    tests = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-n", "5"]
    both = ("jet-2b-fp8", "qwen3-1.7b-bf16", "qwen3-1.7b-fp8")
    return [
        Step("tests", "GPU tests", 300, {"pytest": tests}),
        Step("goldens", "the model against the published implementation's outputs, by the Triton kernels", 120,
             {"goldens": [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/test_goldens.py"]}),
        Step("accuracy", "bf16 errors against fp64, beside FLA's", 120,
             {"accuracy": script("kernels/accuracy_vs_fla.py", "--output", out / "accuracy_vs_fla.json")}),
        *(Step(f"build-{model}", f"bundles of {model}, bf16 and FP8, side by side", 420,
               {n: build(n) for n in BUNDLES if n.startswith(model)}) for model in FAMILIES),
        Step("build-fused", "bundles of jet-2b with --fuse-decode, side by side", 420,
             {n: build(n) for n in BUNDLES if n.startswith("fused")}),
        Step("build-interval", "jet-2b FP8, states written every 1 and 8 tokens, and with drafts, side by side", 420,
             {n: build(n) for n in (*INTERVALS, "speculate-jet-2b-fp8")}),
        *(Step(f"decode-{name}-{context}", f"decode at {context}, {name}", 120,
               {"bench": bench(name, "latency", "--contexts", context, "--batch", batch, "--fill-seconds", "1",
                               directory=f"bench-{context}-{name}")},
               built(name)) for name in INTERVALS for context, batch in (("1k", "1,8,32,64,128"), ("64k", "128"))),
        Step("speculation", "drafts replayed, 80 % and none of them right, beside plain decoding", 240,
             {"speculation": script("serving/speculation.py", bundles / "speculate-jet-2b-fp8", "--batch", "1,8,64",
                                    "--acceptance", "0,0.8", "--output", out / "speculation.json")},
             built("speculate-jet-2b-fp8")),
        *(Step(f"decode-{name}", f"decode at 1K and 64K, {name}", 240,
               {"bench": bench(name, "latency", "--contexts", "1024,64k", "--batch", "1,8,64,128",
                               "--fill-seconds", "5")}, built(name)) for name in BUNDLES if name.startswith("qwen3.5")),
        Step("overlap", "a decode step of the fused bundle, launches one after the other and overlapping", 120,
             {"overlap": script("engine/launch_overlap.py", bundles / "fused-jet-2b-fp8", "--batch", 1, 8, 32, 64, 128,
                                "--output", out / "launch-overlap.json")}, built("fused-jet-2b-fp8")),
        *(Step(f"decode-{name}", f"decode at 1K from one sequence to 128, {name}", 120,
               {"bench": bench(name, "latency", "--contexts", "1024", "--batch", "1,8,32,64,128")}, built(name))
          for name in ("fused-jet-2b-fp8", "jet-2b-fp8", "fused-jet-2b-bf16")),
        Step("loglikelihood", "scoring of 4K documents beside prefill, jet-2b bf16", 90,
             {"loglikelihood": script("engine/loglikelihood.py", bundles / "jet-2b-bf16",
                                      "--output", out / "loglikelihood.json")}, built("jet-2b-bf16")),
        Step("kernels", "every kernel beside FLA, SDPA, FlashInfer", 360,
             {"kernels": script("kernels/kernels.py", "--output", out / "kernels.json")}),
        Step("gated_delta_net", "Gated DeltaNet at Qwen3.5's sizes beside FLA and FlashInfer", 300,
             {"gdn": script("kernels/gated_delta_net.py", "--output", out / "gated_delta_net.json")}),
        Step("hopper", "the delta rule's Hopper form beside the portable one, tiny cases first", 300,
             {"hopper": script("kernels/hopper_delta_rule.py", "--output", out / "hopper_delta_rule.json")}),
        Step("gemv", "linear layers of one token", 60,
             {"gemv": script("kernels/gemv.py", "--output", out / "gemv.json")}),
        Step("fp8-products", "the library's FP8 products, summed in fp32 or fast", 60,
             {"products": script("kernels/fp8_products.py", "--output", out / "fp8_products.json")}),
        Step("build-fast-accumulation", "jet-2b FP8 for 16 sequences, without fast accumulation and with, side by side",
             420, {n: build(n, "16", "16640") for n in SUMS}),
        Step("fast-accumulation", "prefill of 16 x 2048, jet-2b FP8 with fast accumulation beside without",
             240, {"bench": bench(SUMS[1], "latency", "--contexts", "2048,16k", "--batch", "16", "--baseline",
                                  bundles / SUMS[0], directory="bench-fast-accumulation")}, built(*SUMS)),
        Step("skinny", "linear layers of 2 to 128 tokens, every configuration", 300,
             {"skinny": script("kernels/skinny_gemm.py", "--tiles", "all", "--rows", "8,64,128",
                               "--output", out / "skinny_gemm.json")}),
        Step("ncu", "what the kernels wait for", 120,
             {"ncu": script("kernels/ncu_kernels.py", "--seconds", 110, "--output", out / "ncu.json")}),
        Step("attention", "attention's own table", 240,
             {"attention": script("kernels/kernels_attention.py", "--output", out / "kernels_attention.json")}),
        Step("load", "from a process's start to the first token, jet-2b", 120,
             {"load": script("engine/load_time.py", bundles / "jet-2b-bf16", "--output", out / "load_time.json")},
             built("jet-2b-bf16")),
        Step("profile", "a step's kernels, jet-2b FP8", 90,
             {"profile": script("engine/profile_step.py", bundles / "jet-2b-fp8", "--cases", "1:1024", "64:3968",
                                "128:65536",
                                "--prefill", "16:2048", "--output", out / "profile.json")}, built("jet-2b-fp8")),
        Step("end_to_end", "jet-2b and jet-4b, bf16 and FP8: the bundles above, verified and generating", 480,
             {"end_to_end": script("engine/end_to_end.py", "--directory", bundles, "--max-batch-size", BATCH,
                                   "--max-seq-len", TOKENS, "--build", f"prefill-chunk={CHUNK}",
                                   "--output", out / "end-to-end.json")},
             built("jet-2b-fp8", "jet-2b-bf16", "jet-4b-fp8", "jet-4b-bf16")),
        Step("paper", "the paper's protocol and ratios, jet-2b FP8", 600,
             {"bench": bench("jet-2b-fp8", "paper", *qwen)}, built(*both)),
        Step("paper-bf16", "the paper's protocol, jet-2b bf16", 300,
             {"bench": bench("jet-2b-bf16", "paper")}, built("jet-2b-bf16")),
        Step("paper-4b", "the paper's protocol, jet-4b FP8", 300,
             {"bench": bench("jet-4b-fp8", "paper")}, built("jet-4b-fp8")),
        Step("paper-4b-bf16", "the paper's protocol, jet-4b bf16", 300,
             {"bench": bench("jet-4b-bf16", "paper")}, built("jet-4b-bf16")),
        Step("latency", "one sequence, 1K to 128K, jet-2b FP8", 300,
             {"bench": bench("jet-2b-fp8", "latency")}, built("jet-2b-fp8")),
        Step("search", "the paper's nine JetBlocks at 64K, batch 128: layers, and whole models on the front", 1200,
             {"search": [*CLI, "search", "--model", "jet-2b", "--device", "cuda", "--jobs", "13", "--resume",
                         "--space", str(BENCHMARKS / "spaces" / "paper-h100.toml"), "--output", str(out / "search"),
                         "--database", str(bundles / "measurements.db")]}),
        Step("tune", "configurations of the kernels", 540,
             {"tune": script("kernels/tune.py", "--minutes", 8, "--output", out / "tune.json")}),
        Step("sanitize", "compute-sanitizer: memcheck, racecheck, synccheck", 600,
             {"sanitize": script("kernels/sanitize.py", "--tools", "memcheck,racecheck,synccheck", "--seconds", 190,
                                 "--processes", 6,
                                 "--output", out / "sanitize.json")}),
        Step("hostile", "the plugins on meaningless inputs, under compute-sanitizer and timed", 420,
             {"hostile": script("kernels/hostile_enqueues.py", "--fetch-headers", "--output", out / "hostile.json")}),
        Step("serving", "a burst of requests, and load through the scheduler, jet-2b FP8", 300,
             {"bench": bench("jet-2b-fp8", "serving", "--contexts", "1024,8192", "--batch", "32")},
             built("jet-2b-fp8")),
        Step("serve_load", "concurrency, Poisson arrivals, a long prompt joining, jet-2b FP8", 420,
             {"load": script("serving/serve_load.py", bundles / "jet-2b-fp8", "--slots", "32",
                               "--concurrency", "1", "8", "32",
                             "--output", out / "serve-load.json")}, built("jet-2b-fp8")),
        Step("simulate", "`simulate` held against a server at three loads, jet-2b FP8", 480,
             {"simulate": script("serving/simulate_truth.py", bundles / "jet-2b-fp8", "--output", out / "simulate")},
             built("jet-2b-fp8")),
        Step("soak", "mixed traffic for eight minutes, jet-2b FP8 with drafts; a million tokens against fp64", 600,
             {"soak": script("serving/soak.py", bundles / "speculate-jet-2b-fp8", "--minutes", 8, "--output",
                             out / "soak.json"),
              "million": script("kernels/million_tokens.py", "--device", "cuda", "--output",
                                out / "million-tokens.json")},
             built("speculate-jet-2b-fp8")),
        Step("training", "a layer's training beside FLA's, the distillation loss", 240,
             {"layer": script("kernels/train_layer.py", "--output", out / "train_layer.json")}),
        *(Step(f"retrofit-{model}", f"tokens/s and memory of a retrofit by phase, {model}", 300,
               {"retrofit": script("training/retrofit_speed.py", "--model", model, "--minutes", 4, "--output",
                                   out / f"retrofit_speed-{model}.json")}) for model in ("jet-2b", "jet-4b")),
        Step("ablation", "eager, torch.compile, engine bf16, FP8, FP8 KV", 900,
             {"ablation": script("engine/ablation.py", "--directory", bundles / "ablation", "--output",
                                 out / "ablation.json")}),
    ]  # fmt: skip


def run_step(step: Step, logs: Path, seconds: float) -> Outcome:
    """Run a step's commands side by side, each in a process group that is killed whole at the limit."""
    missing = [p for p in step.needs if not p.exists()]
    if missing:
        return Outcome(f"not run: {missing[0].parent.name} is missing")
    logs.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    running: dict[str, subprocess.Popen] = {}
    for name, command in step.commands.items():
        with (logs / f"{step.name}-{name}.log").open("w") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    codes: dict[str, int | None] = {}
    for name, process in running.items():
        try:
            codes[name] = process.wait(max(0.1, seconds - (time.monotonic() - begin)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            codes[name] = None
    late = any(c is None for c in codes.values())
    status = "timed out" if late else "passed" if not any(codes.values()) else "failed"
    return Outcome(status, round(time.monotonic() - begin, 1), codes)


def load(path: Path) -> dict[str, Outcome]:
    if not path.exists():
        return {}
    return {name: Outcome(**values) for name, values in json.loads(path.read_text())["steps"].items()}


def save(path: Path, done: dict[str, Outcome]) -> None:
    from jet_export.utils.environment import environment

    values: dict[str, Any] = {"environment": environment(), "steps": {n: vars(o) for n, o in done.items()}}
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def run_session(chosen: list[Step], out: Path, minutes: float, again: bool) -> dict[str, Outcome]:
    """Every chosen step that has not passed, while time is left; session.json is kept after each."""
    from jet_export.utils.environment import source_commit  # imports torch

    done = load(out / "session.json")
    begin = time.monotonic()
    for step in chosen:
        if not again and step.name in done and done[step.name].status == "passed":
            continue
        left = 60 * minutes - (time.monotonic() - begin)
        if left < min(20, step.seconds):
            done[step.name] = Outcome("not run: no time left")
        else:
            print(f"{step.name}: {step.what}, at most {min(step.seconds, left):.0f} s", flush=True)
            done[step.name] = run_step(step, out / "logs", min(step.seconds, left))
            done[step.name].commit = source_commit()
            print(f"{step.name}: {done[step.name].status} ({done[step.name].seconds} s)", flush=True)
        save(out / "session.json", done)
    return done


def summary(every: list[Step], done: dict[str, Outcome]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("step", "status", "seconds", "commit", "exit status", "what"):
        table.add_column(name, no_wrap=name != "what")
    for step in every:
        o = done.get(step.name, Outcome("not run"))
        bad = ", ".join(f"{n}: {'killed' if c is None else c}" for n, c in o.exit_status.items() if c != 0)
        table.add_row(step.name, o.status, f"{o.seconds:.0f}" if o.seconds else "", o.commit, bad, step.what)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "results" / "session")
    parser.add_argument("--bundles", type=Path, default=Path("bundles") / "session")
    parser.add_argument("--only", help="these steps, by name")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--again", action="store_true", help="also steps that have passed")
    parser.add_argument("--list", action="store_true", help="the steps and their commands, and stop")
    args = parser.parse_args()
    every = steps(args.output, args.bundles)
    names = [s.name for s in every] if args.only is None else args.only.split(",")
    unknown = [n for n in names if n not in {s.name for s in every}]
    if unknown:
        print(f"--only {unknown[0]}: no such step. Known: {', '.join(s.name for s in every)}.", file=sys.stderr)
        return 2
    if args.list:
        for s in every:
            print(f"{s.name}: {s.what}, at most {s.seconds:.0f} s")
            for command in s.commands.values():
                print(f"    {shlex.join(command)}")
        return 0
    chosen = [s for s in every if s.name in names]
    done = run_session(chosen, args.output, args.minutes, args.again)
    Console(width=150, highlight=False).print(summary(every, done))
    return 0 if all(done[n].status == "passed" for n in names) else 1


if __name__ == "__main__":
    sys.exit(main())
