"""Where the time from a process's start to a bundle's first token goes, stage by stage.

    python benchmarks/engine/load_time.py BUNDLE [--runs 3] [--output FILE]

Each run is a process of its own, and the first may find files that the machine has not cached. The stages come one
after the other: `jet-export` itself hashes files while the weights are loaded, so that its load is shorter than the
sum; the last run is the load as users have it, `LLM(BUNDLE)`. Calls are synchronised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPT = 512
Seconds = dict[str, float]


@contextmanager
def stage(seconds: Seconds, name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def imports(seconds: Seconds, started: float) -> None:
    """`started`: the wall's clock as the process was launched."""
    seconds["start Python"] = time.time() - started
    with stage(seconds, "import torch"):
        import torch  # noqa: F401
    with stage(seconds, "import jet_export"):
        import jet_export.runtime.llm  # noqa: F401


def init_device(seconds: Seconds, device: Any) -> None:
    import torch

    if device.type == "cuda":
        with stage(seconds, "CUDA: torch.cuda.init"):
            torch.cuda.init()
        with stage(seconds, "CUDA: first allocation"):
            torch.zeros(1, device=device)
            torch.cuda.synchronize(device)


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def staged(bundle: Path, started: float) -> Seconds:
    """Every stage of one load, one after the other, and the first calls."""
    s: Seconds = {}
    imports(s, started)
    from jet_export.backends.eager import load_weights
    from jet_export.backends.inductor.engine import InductorEngine, Package, package_paths
    from jet_export.backends.load import check_host
    from jet_export.bundle.manifest import Manifest, check_files
    from jet_export.runtime.llm import LLM
    from jet_export.runtime.tokenizer import load_tokenizer

    with stage(s, "manifest"):
        manifest = Manifest.load(bundle)
    if manifest.backend["name"] != "inductor":
        sys.exit(f"{bundle}: a bundle of backend {manifest.backend['name']}; this times inductor's.")
    device = manifest.device
    init_device(s, device)
    with stage(s, "check the host"):
        check_host(bundle, manifest)
    with stage(s, "check hashes"):
        check_files(bundle, manifest)
    with stage(s, "weights to the device"):
        weights = load_weights(bundle, manifest)
        synchronize(device)
    graphs = {}
    for mode, path in package_paths(bundle).items():
        with stage(s, f"{mode}.pt2: load"):
            graphs[mode] = Package(path, device)
        with stage(s, f"{mode}.pt2: give it the weights"):
            graphs[mode].load_weights(weights, path)
            synchronize(device)
    engine = InductorEngine(manifest, weights, graphs)
    with stage(s, "tokenizer"):
        tokenizer = load_tokenizer(bundle)
    with stage(s, "LLM: pools, scheduler"):
        llm = LLM.over(engine, tokenizer, -1)
        synchronize(device)
    first_calls(s, llm)
    return s


def prompt_of(llm: Any) -> list[int]:
    n = min(PROMPT, llm.engine.limits.prefill_chunk, llm.engine.limits.max_seq_len - 4)
    return [i % llm.engine.config.vocab_size for i in range(100, 100 + n)]


def first_calls(s: Seconds, llm: Any) -> None:
    """Prefill twice, then decode three times: on a GPU the first captures a CUDA graph."""
    import torch

    runner, prompt, device = llm.runner, prompt_of(llm), llm.engine.device
    pages = runner.block_table.shape[1], runner.window_block_table.shape[1]
    for which in ("first", "second"):
        runner.assign(0, list(range(pages[0])), list(range(pages[1])))
        with stage(s, f"{which} prefill, {len(prompt)} tokens"):
            logits = runner.prefill([0], [prompt])
            synchronize(device)
    with stage(s, "first argmax and fetch"):
        tokens = logits.argmax(-1)
        tokens.tolist()
    for which in ("first", "second", "third"):
        with stage(s, f"{which} decode"):
            tokens = runner.decode([0], torch.as_tensor(tokens, device=device)).argmax(-1)
            synchronize(device)


def whole(bundle: Path, started: float) -> Seconds:
    """As users load it: `LLM(bundle)`, then one token of the prompt."""
    s: Seconds = {}
    imports(s, started)
    from jet_export.runtime.llm import LLM

    with stage(s, "LLM(bundle)"):
        llm = LLM(bundle)
    with stage(s, "generate 1 token"):
        llm.generate([prompt_of(llm)], 1, ignore_eos=True)
    return s


def run_apart(bundle: Path, what: str) -> Seconds:
    command = [sys.executable, __file__, str(bundle), "--here", what, "--started", repr(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    seconds: Seconds = json.loads(done.stdout.splitlines()[-1])
    return seconds


def show(title: str, runs: list[Seconds]) -> None:
    print(f"\n{title}: seconds of {len(runs)} runs in turn, and their median")
    for name in runs[0]:
        each = [r[name] for r in runs]
        print(f"  {name:34}{statistics.median(each):9.3f}   {' '.join(f'{t:.3f}' for t in each)}")
    print(f"  {'all':34}{statistics.median(sum(r.values()) for r in runs):9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--here", choices=("staged", "whole"), help=argparse.SUPPRESS)  # one run, in this process
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        seconds = {"staged": staged, "whole": whole}[args.here](args.bundle, args.started)
        print(json.dumps(seconds))
        return
    runs = {what: [run_apart(args.bundle, what) for _ in range(args.runs)] for what in ("staged", "whole")}
    show(f"{args.bundle.name}, stage by stage", runs["staged"])
    show(f"{args.bundle.name}, as users load it", runs["whole"])
    if args.output:
        from jet_export.utils.environment import write_result

        size = sum(p.stat().st_size for p in args.bundle.rglob("*") if p.is_file())
        write_result(args.output, {"bundle": args.bundle.name, "bundle_bytes": size, "seconds": runs})


if __name__ == "__main__":
    main()
