"""Time to first token of a prompt with a shared prefix, with and without a hit in the prefix cache.

    python benchmarks/serving/prefix_ttft.py BUNDLE --shared 32768 --output benchmarks/results/prefix-ttft-h100.json

A prompt is `--shared` tokens and `--own` tokens of its own. Miss: the cache is empty; hit: another prompt with the same
prefix has run. Before anything is timed, a hit in deterministic mode has to give the same bits as a miss.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from load_clients import CLOCK

from jet_export.backends.load import load_engine
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.environment import write_result


def first_token(batching: BatchingEngine, prompt: list[int], new: int = 1) -> tuple[float, RunningSequence]:
    """Seconds to the first token, and the finished request."""
    times: list[float] = []
    begin = CLOCK.now()
    params = Params(new, ignore_eos=True)
    request = batching.submit(prompt, params, lambda _: times.append(CLOCK.now()), keep_logits=new > 1)
    while batching.step():
        pass
    return times[0] - begin, request


def same_bits(make, shared: list[int], own: list[int]) -> bool:
    chunk = make().scheduler.capacity.prefill_chunk
    batching = make(deterministic=True, token_budget=chunk)
    runs = [first_token(batching, shared + own, 4)[1] for _ in range(2)]
    assert batching.metrics.prefix_hits == 1, "the prompt is too short for the cache"
    return runs[0].tokens == runs[1].tokens and torch.equal(*(torch.stack(r.logits) for r in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shared", type=int, default=32768)
    parser.add_argument("--own", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cache-bytes", type=int, default=4 << 30)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: see load_clients.Clock")
    args = parser.parse_args()
    CLOCK.cpu = args.clock == "cpu"
    load = os.getloadavg()
    engine, manifest = load_engine(args.bundle)
    tokenizer, rng = load_tokenizer(args.bundle), random.Random(0)
    longest = engine.limits.max_seq_len - args.own - 8
    shared_len = min(args.shared, longest)

    def make(**options) -> BatchingEngine:
        serving = Serving(slots=1, prefix_cache_bytes=args.cache_bytes, **options)
        return BatchingEngine(engine, tokenizer, -1, serving)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(engine.config.vocab_size) for _ in range(n)]

    if not same_bits(make, tokens(shared_len), tokens(args.own)):
        sys.exit("A hit and a miss give different bits: nothing is timed.")
    batching, hits, misses, sizes = make(), [], [], []
    prefixes = batching.scheduler.prefixes
    assert prefixes is not None  # same_bits had a hit
    first_token(batching, tokens(args.own))  # warm-up
    for _ in range(args.repeats):
        while batching.scheduler.memory.evict():
            pass
        shared = tokens(shared_len)
        misses.append(first_token(batching, shared + tokens(args.own))[0])
        sizes.append(batching.scheduler.memory.prefix_bytes)
        hits.append(first_token(batching, shared + tokens(args.own))[0])
    m = batching.metrics
    result: dict[str, Any] = {
        "model": manifest.model["name"],
        "precision": "fp8" if manifest.quantization else manifest.dtype,
        "limits": asdict(manifest.limits),
        "clock": args.clock,
        "shared_tokens": shared_len,
        "own_tokens": args.own,
        "interval": batching.scheduler.capacity.prefix_interval,
        "tokens_saved_a_hit": m.prefix_tokens // m.prefix_hits,
        "cache_bytes_a_prompt": sizes[0],
        "entries_a_prompt": len(prefixes.entries),
        "miss_ms": [round(1e3 * t, 2) for t in misses],
        "hit_ms": [round(1e3 * t, 2) for t in hits],
        "load_average": {"before": load, "after": os.getloadavg()},
    }
    miss, hit = (1e3 * statistics.median(x) for x in (misses, hits))
    print(
        f"{result['model']} {result['precision']}: {shared_len} shared tokens and {args.own} more, "
        f"first token after {miss:.0f} ms, from the cache {hit:.0f} ms ({miss / hit:.1f} times sooner; "
        f"{result['tokens_saved_a_hit']} tokens saved, {sizes[0] / 2**20:.1f} MiB kept)"
    )
    write_result(args.output, result)


if __name__ == "__main__":
    main()
