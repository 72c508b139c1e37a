"""What a mixed step takes beside a plain one: prompt tokens and decoding sequences in one call, and in two.

    python benchmarks/engine/mixed_step.py BUNDLE [--prompts 256 512 576] [--decoding 8 63] [--held 640] [--output FILE]

One prompt's tokens beside sequences that hold --held tokens each, on states of zeros. On a GPU the calls are CUDA
graphs that were captured before; "device" is the time between two events around a call, "host" that until its launch
returns. Medians of --repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jet_export.backends.base import Engine
from jet_export.backends.load import load_engine
from jet_export.model.cache import PAGE, cdiv, pages_per_sequence
from jet_export.runtime.runner import PoolSize, Runner
from jet_export.utils.environment import write_result


def runner_of(engine: Engine, decoding: int, held: int, prompt: int) -> Runner:
    """Slot 0 for the prompt, the others hold `held` tokens."""
    table, ring = pages_per_sequence(engine.config, engine.limits.max_seq_len, engine.limits.prefill_chunk)
    pages = cdiv(max(held + 1, prompt), PAGE)
    window, slots = min(ring, pages), decoding + 1
    pools = PoolSize(slots=slots, pages=slots * pages, window_pages=slots * window, table_pages=table, ring_pages=ring)
    runner = Runner(engine, pools=pools)
    for slot in range(slots):
        runner.assign(
            slot, list(range(slot * pages, (slot + 1) * pages)), list(range(slot * window, (slot + 1) * window))
        )
    return runner


def timed(call: Callable[[], Any], reset: Callable[[], None], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds; the first two calls, which capture and warm up, are not counted."""
    on_device, on_host = [], []
    for i in range(repeats + 2):
        reset()
        host, gpu = one_call(call, device)
        if i >= 2:
            on_host.append(host)
            on_device.append(gpu)
    return {"device_ms": round(statistics.median(on_device), 4), "host_ms": round(statistics.median(on_host), 4)}


def one_call(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(host, device) milliseconds; on a CPU they are the same."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (1e3 * (time.perf_counter() - start),) * 2
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    before.record()
    call()
    after.record()
    host = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return host, before.elapsed_time(after)


@torch.inference_mode()
def measure(engine: Engine, prompt: int, decoding: int, held: int, repeats: int) -> dict[str, Any]:
    runner = runner_of(engine, decoding, held, prompt)
    ids = torch.randint(0, engine.config.vocab_size, (prompt,)).tolist()
    slots = list(range(1, decoding + 1))

    def reset() -> None:
        runner.reset(0)
        for slot in slots:
            runner.hold(slot, held)

    def two_calls() -> None:
        runner.mixed([0], [ids])
        runner.decode(slots)

    calls: dict[str, Callable[[], Any]] = {
        "mixed": lambda: runner.mixed([0, *slots], [ids, *[None] * decoding]),
        "two calls": two_calls,
        "prompt alone": lambda: runner.mixed([0], [ids]),
        "decode alone": lambda: runner.decode(slots),
    }
    times = {name: timed(call, reset, engine.device, repeats) for name, call in calls.items()}
    return {"prompt_tokens": prompt, "decoding": decoding, "times": times}


def line_of(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {t['device_ms']:.2f} ({t['host_ms']:.2f})" for name, t in row["times"].items())
    return f"{row['prompt_tokens']:5} + {row['decoding']:3}: {times}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 256, 512, 569])
    parser.add_argument("--decoding", type=int, nargs="+", default=[8, 32, 63])
    parser.add_argument("--held", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    engine, manifest = load_engine(args.bundle)
    print("milliseconds on the device (and until the launch returned)")
    rows = []
    for prompt in args.prompts:
        for decoding in args.decoding:
            rows.append(measure(engine, prompt, decoding, args.held, args.repeats))
            print(line_of(rows[-1]), flush=True)
    if args.output:
        write_result(args.output, {"model": manifest.config.raw.get("model_type"), "held": args.held, "rows": rows})


if __name__ == "__main__":
    main()
