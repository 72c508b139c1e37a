"""Build, verify and run bundles of random weights on this machine's GPU, and write what came out as JSON.

    python benchmarks/engine/end_to_end.py --models jet-2b jet-4b --output benchmarks/results/h200/end-to-end.json

Each (model, precision) is built by its own `jet-export build` process, all at once, and verified by `jet-export verify`
as soon as it is there, --verify-jobs at a time. Then, one after the other with nothing beside it, it is timed: load to
first token, and greedy decoding of one sequence and of a full batch through `LLM` (CUDA graphs, sampling and
detokenising included). A bundle that fails verification is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any

CLI = [sys.executable, "-m", "jet_export.cli.app"]

TIMING = """
import json, sys, time
start = time.monotonic()
import torch
from jet_export import LLM
llm = LLM(sys.argv[1])
first = []
llm.generate([list(range(100, 612))], 1, ignore_eos=True, on_token=lambda i, t: first.append(time.monotonic()))
out = {"load_to_first_token_s": first[0] - start, "tokens_per_s": {}}
for n in (1, min(int(sys.argv[3]), llm.engine.limits.max_batch_size)):
    rng = torch.Generator().manual_seed(n)
    prompts = torch.randint(0, llm.engine.config.vocab_size, (n, int(sys.argv[2])), generator=rng).tolist()
    llm.generate(prompts, 4, ignore_eos=True)
    count, stamps = [0] * n, []
    def on_token(i, t):
        count[i] += 1
        if min(count) and max(count) < 128:  # every sequence decodes: prompts come in one after the other
            stamps.append(time.monotonic())
    llm.generate(prompts, 128, ignore_eos=True, on_token=on_token)
    steps = stamps[n - 1 :: n]  # one point of every step
    assert len(steps) > 12, f"only {len(steps)} steps of the full batch"
    times = sorted(b - a for a, b in zip(steps[8:], steps[9:]))
    median = times[len(times) // 2]
    p90 = times[len(times) * 9 // 10]
    out["tokens_per_s"][n] = {"median": n / median, "step_ms": 1e3 * median, "p90_step_ms": 1e3 * p90}
out["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
print(json.dumps(out))
"""


def start_build(model: str, fp8: bool, batch: int, seq: int, directory: Path, more: list[str]) -> dict[str, Any]:
    output = directory / f"{model}-{'fp8' if fp8 else 'bf16'}"
    args = ["build", "--model", model, "--random-weights", "--backend", "inductor", "--output", str(output)]
    args += ["--max-batch-size", str(batch), "--max-seq-len", str(seq), *more] + (["--fp8"] if fp8 else [])
    log = open(f"{output}.build.log", "w")  # noqa: SIM115  the child writes to it
    process = subprocess.Popen([*CLI, *args], stdout=log, stderr=subprocess.STDOUT)
    shown = [a if a != str(output) else output.name for a in args]
    return {"bundle": output, "process": process, "start": time.monotonic(), "command": "jet-export " + " ".join(shown)}


def finish_build(job: dict[str, Any]) -> dict[str, Any]:
    _, status, usage = os.wait4(job["process"].pid, 0)
    return {
        "build_command": job["command"],
        "build_exit_status": os.waitstatus_to_exitcode(status),
        "build_s": round(time.monotonic() - job["start"], 1),
        "build_peak_host_memory_gb": round(usage.ru_maxrss / 1e6, 2),
    }


def run(args: list[str], log: Path) -> tuple[int, str]:
    done = subprocess.run(args, capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr)
    return done.returncode, done.stdout


def build_and_verify(case: tuple[str, str], job: dict[str, Any], verifying: Semaphore) -> dict[str, Any]:
    """Wait for a build, then verify its bundle."""
    bundle: Path = job["bundle"]
    result: dict[str, Any] = {"model": case[0], "precision": case[1], **finish_build(job)}
    print(f"{case[0]} {case[1]}: built in {result['build_s']} s", flush=True)
    if result["build_exit_status"]:
        return result
    with verifying:
        start = time.monotonic()
        report = Path(f"{bundle}.verify.json")
        result["verify_exit_status"], _ = run(
            [*CLI, "verify", str(bundle), "--json", str(report)], Path(f"{bundle}.verify.log")
        )
        result["verify_s"] = round(time.monotonic() - start, 1)
    if report.exists():
        result["verify"] = json.loads(report.read_text())
    return result


def time_bundle(bundle: Path, prompt_tokens: int, batch: int) -> dict[str, Any]:
    """The figures of one verified bundle."""
    result: dict[str, Any] = {}
    status, out = run(
        [sys.executable, "-c", TIMING, str(bundle), str(prompt_tokens), str(batch)], Path(f"{bundle}.timing.log")
    )
    if status == 0:
        result["timing"] = {**json.loads(out.strip().splitlines()[-1]), "prompt_tokens": prompt_tokens}
    result["bundle_bytes"] = sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["jet-2b", "jet-4b"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64, help="sequences of the full batch that is timed")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument(
        "--build", nargs="*", default=[], help="more options of the builds, without --: kv-cache-dtype=fp8"
    )
    parser.add_argument("--verify-jobs", type=int, default=2, help="bundles verified side by side")
    parser.add_argument("--directory", type=Path, help="keep bundles and logs here")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    from jet_export.utils.environment import environment

    directory = args.directory or Path(tempfile.mkdtemp(prefix="jet-bundles-"))
    directory.mkdir(parents=True, exist_ok=True)
    cases = [(m, p) for m in args.models for p in args.precisions]
    jobs = [
        start_build(m, p == "fp8", args.max_batch_size, args.max_seq_len, directory, [f"--{o}" for o in args.build])
        for m, p in cases
    ]
    verifying = Semaphore(args.verify_jobs)
    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(build_and_verify, cases, jobs, [verifying] * len(cases)))
    for r, job in zip(results, jobs, strict=True):
        if r.get("verify_exit_status") == 0:
            r.update(time_bundle(job["bundle"], args.prompt_tokens, args.batch))
        print(summary(r), flush=True)
        args.output.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")
    sys.exit(any(r.get("verify_exit_status", 1) for r in results))


def summary(r: dict[str, Any]) -> str:
    if r["build_exit_status"]:
        return f"{r['model']} {r['precision']}: build failed"
    if r["verify_exit_status"]:
        return f"{r['model']} {r['precision']}: verify failed, not timed"
    t = r.get("timing", {})
    rates = ", ".join(f"B{n} {v['median']:.0f} tok/s" for n, v in t.get("tokens_per_s", {}).items())
    first = t.get("load_to_first_token_s", 0)
    return f"{r['model']} {r['precision']}: verified in {r['verify_s']} s; first token {first:.1f} s; {rates}"


if __name__ == "__main__":
    main()
