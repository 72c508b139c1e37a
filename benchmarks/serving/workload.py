"""The same 256 requests for every engine: what a bundle serves of them, by sampling settings.

    python benchmarks/serving/workload.py BUNDLE [--slots 64] [--through engine,async] [--kinds greedy,schema]

Prompts of about 512 random tokens, about 256 new ones (log-normal, sigma 0.5, one seed), all submitted together,
--slots at once, end-of-sequence tokens ignored. `engine`: the caller takes the steps (LLM.generate's way). `async`:
AsyncLLM, a task a request. Output tokens/s from the first submission to the last token; milliseconds between the
tokens of a request, also as multiples of a plain decode step of --slots rows. It all runs once before, so that every
CUDA graph is there. The ideal is a simulation of these requests at the engine's own speeds, measured first (decode
steps by batch size, prompts of 16 x 2048; nothing overlaps: jet_export/bench/ideal.py); serving may exceed it.
`schema`: structured output by a schema that no answer completes. Its masks are those of the bundle's tokenizer; a
bundle of random weights without one takes --tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving_options import LONG_SCHEMA, add_serving, given_serving, serving_of

from jet_export.backends.base import Engine
from jet_export.backends.load import load_engine
from jet_export.bench.ideal import Ideal, Speeds, batch_sizes, measure_speeds, simulate
from jet_export.bench.timer import percentile
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.params import Output, Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.environment import device_slug, write_result

RESULTS = Path(__file__).resolve().parents[1] / "results"
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"sampling": {"temperature": 1.0}},
    "t 0.8 top_p 0.95": {"sampling": {"temperature": 0.8, "top_p": 0.95}},
    "t 0.8 top_k 50": {"sampling": {"temperature": 0.8, "top_k": 50}},
    "repetition 1.1": {"repetition_penalty": 1.1},
    "5 logprobs": {"logprobs": 5},
    "schema": {"grammar": Grammar.json_schema(LONG_SCHEMA)},
    "schema t 1": {"grammar": Grammar.json_schema(LONG_SCHEMA), "sampling": {"temperature": 1.0}},
}
PLAIN = [kind for kind in KINDS if "grammar" not in KINDS[kind]]
Request = tuple[list[int], int]  # prompt, new tokens


def requests(n: int = 256, vocab: int = 150_000, seed: int = 7) -> list[Request]:
    """The workload. The order of the draws is part of it."""
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - 0.125, 0.5)))

    return [([rng.randrange(vocab) for _ in range(length(512))], length(256)) for _ in range(n)]


def params_of(kind: str, request: int, new: int) -> Params:
    options = dict(KINDS[kind])
    sampling = Sampling(seed=request, **options.pop("sampling", {}))
    return Params(new, sampling, ignore_eos=True, **options)


class Trace:
    """When each request's tokens came, on one clock."""

    def __init__(self, n: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(n)]
        self.reasons: list[str | None] = [None] * n

    def listener(self, i: int) -> Callable[[Output], None]:
        def hear(output: Output) -> None:
            if output.token is not None:
                self.times[i].append(time.perf_counter())
            self.reasons[i] = output.finish_reason or self.reasons[i]

        return hear

    def summary(self, start: float) -> dict[str, float]:
        gaps = [1e3 * (b - a) for t in self.times for a, b in itertools.pairwise(t)]
        tokens = sum(map(len, self.times))
        seconds = max(t[-1] for t in self.times) - start
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "between_tokens_ms_p50": round(statistics.median(gaps), 2),
            "between_tokens_ms_p95": round(percentile(gaps, 0.95), 2),
            "between_tokens_ms_p99": round(percentile(gaps, 0.99), 2),
            "ttft_ms_p50": round(1e3 * statistics.median(t[0] - start for t in self.times), 1),
        }


def run_engine(engine: BatchingEngine, work: list[Request], kind: str) -> dict[str, float]:
    trace, start = Trace(len(work)), time.perf_counter()
    for i, (prompt, new) in enumerate(work):
        engine.submit(prompt, params_of(kind, i, new), trace.listener(i), text=False)
    while engine.step():
        pass
    check(trace, work)
    return trace.summary(start)


def run_async(engine: BatchingEngine, work: list[Request], kind: str) -> dict[str, float]:
    llm, trace = AsyncLLM.over(engine), Trace(len(work))

    async def one(i: int) -> None:
        prompt, new = work[i]
        hear = trace.listener(i)
        async for _, output in llm.stream([prompt], params_of(kind, i, new)):
            hear(output)

    async def everyone() -> float:
        start = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(len(work))))
        return start

    llm.start()
    try:
        start = asyncio.run(everyone())
    finally:
        llm.stop()
    check(trace, work)
    return trace.summary(start)


def check(trace: Trace, work: list[Request]) -> None:
    """Every request got all its tokens; a figure of anything else would be worth nothing."""
    wrong = [i for i, (_, new) in enumerate(work) if len(trace.times[i]) != new or trace.reasons[i] != "length"]
    if wrong:
        i = wrong[0]
        raise SystemExit(f"request {i} got {len(trace.times[i])} of {work[i][1]} tokens; ended by {trace.reasons[i]}")


def measure_ideal(engine: Engine, work: list[Request], slots: int) -> tuple[Speeds, Ideal]:
    """The speeds of an engine that nothing else uses yet, and what they allow. The steps timed hold what the requests
    hold on average: their prompts and half of their new tokens."""
    held = round(statistics.mean(len(prompt) + new / 2 for prompt, new in work))
    speeds = measure_speeds(engine, batch_sizes(slots), held_tokens=held)
    return speeds, simulate([(len(prompt), new) for prompt, new in work], slots=slots, speeds=speeds)


def compared(row: dict[str, float], speeds: Speeds, ideal: Ideal, slots: int) -> dict[str, float]:
    """A row's share of the ideal, and its times between tokens in plain decode steps of `slots` rows."""
    step = 1e3 * speeds.step(slots)
    steps = {f"between_tokens_steps_{p}": round(row[f"between_tokens_ms_{p}"] / step, 2) for p in ("p50", "p95", "p99")}
    return {"of_ideal": round(row["tokens_per_s"] / ideal.tokens_per_s, 4), **steps}


def describe(row: dict[str, Any]) -> str:
    between = ", ".join(
        f"{p} {row[f'between_tokens_ms_{p}']:.2f} ms ({row[f'between_tokens_steps_{p}']:.1f} steps)"
        for p in ("p50", "p95", "p99")
    )
    speed = f"{row['tokens_per_s']:9,.0f} tokens/s, {row['of_ideal']:.0%} of the ideal"
    return f"{row['kind']:18} {row['through']:7} {speed}; between tokens {between}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--through", default="engine,async")
    parser.add_argument("--kinds", default=",".join(PLAIN), help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--tokenizer", type=Path, help="directory whose tokenizer.json makes the schema's masks")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/<gpu>/workload-<bundle>.json")
    add_serving(parser, slots=64)
    options = parser.parse_args()
    loaded, manifest = load_engine(options.bundle)
    work = requests(options.requests, min(150_000, loaded.config.vocab_size))
    speeds, ideal = measure_ideal(loaded, work, options.slots)
    print(speeds.describe())
    print(
        f"ideal for {options.slots} slots: {ideal.tokens_per_s:,.0f} tokens/s: {ideal.steps} steps in "
        f"{ideal.decode_seconds:.2f} s, prompts in {ideal.prompt_seconds:.2f} s",
        flush=True,
    )
    tokenizer = load_tokenizer(options.tokenizer or options.bundle)
    engine = BatchingEngine(loaded, tokenizer, -1, serving_of(options))
    runs = {"engine": run_engine, "async": run_async}
    engine.grammars.warm_up()
    run_engine(engine, work, "greedy")  # every CUDA graph that the work needs
    rows: list[dict[str, Any]] = []
    for kind in options.kinds.split(","):
        for through in options.through.split(","):
            for _ in range(options.repeats):
                row = runs[through](engine, work, kind)
                rows.append({"kind": kind, "through": through, **row, **compared(row, speeds, ideal, options.slots)})
                print(describe(rows[-1]), flush=True)
                if through == "async":  # its thread has ended; the engine takes new requests again
                    engine.stopping = False
    output = options.output or RESULTS / device_slug() / f"workload-{options.bundle.name}.json"
    about = {"bundle": options.bundle.name, "limits": manifest.limits.__dict__, "serving": given_serving(options)}
    prompt_tokens = sum(len(prompt) for prompt, _ in work)
    measured = {"speeds": asdict(speeds), "ideal": ideal.to_dict(), "rows": rows}
    write_result(output, {**about, "requests": len(work), "prompt_tokens": prompt_tokens, **measured})


if __name__ == "__main__":
    main()
