"""A bundle under load: throughput, latency, and what a long prompt costs the other requests.

    python benchmarks/serving/serve_load.py BUNDLE --output benchmarks/results/cpu/serve-load.json

Random prompts, lengths log-normal around --prompt-tokens and --output-tokens (sigma 0.5). Three parts:
  concurrency   a fixed number of requests at once: continuous batching (the next request joins when one ends), static
                batches (the next batch starts when all of the last one have ended), and deterministic mode
  poisson       arrivals at given fractions of the throughput just measured; goodput counts requests within the SLO
  join          inter-token latency of running requests while one long prompt joins them
Times are the client's: TTFT from when a request was due, TPOT the mean after the first token. In this process through
AsyncLLM, or with --http through `jet-export serve --openai` on loopback. Before, the engine's own speeds are measured
without a scheduler; the ideal of each row is a simulation of its requests at these speeds (jet_export/bench/ideal.py).
"of ideal" may exceed 100 %. Times between tokens are also given in plain decode steps of as many rows as run at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from load_clients import CLOCK, Client, Http, InProcess, LoadRequest, Trace, http_server
from load_report import print_tables
from load_workload import Workload, speeds_of
from serving_options import add_sampling, add_serving, params_of, sampling_of, serve_arguments, serving_of

from jet_export.backends.load import load_engine
from jet_export.bench.timer import percentile
from jet_export.bundle.manifest import Manifest
from jet_export.bundle.memory import free_cached
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.environment import write_result

PERCENTILES = (0.5, 0.95, 0.99)


async def send_all(client: Client, requests: list[LoadRequest], due: list[float]) -> list[Trace]:
    """Send each request at its due time, in seconds from now, ascending."""
    start = CLOCK.now()
    traces = [Trace(start + d) for d in due]
    tasks: list[asyncio.Task] = []
    for request, trace in zip(requests, traces, strict=True):
        while (wait := trace.due - CLOCK.now()) > 0:
            if CLOCK.cpu and all(task.done() for task in tasks):
                CLOCK.skip(trace.due)
            else:
                await asyncio.sleep(0.002 if CLOCK.cpu else wait)
        tasks.append(asyncio.create_task(client.run(request, trace)))
    await asyncio.gather(*tasks)
    return traces


async def closed_loop(client: Client, requests: list[LoadRequest], concurrency: int) -> list[Trace]:
    """Keep `concurrency` requests running until all have been sent."""
    left, traces = iter(requests), []

    async def worker() -> None:
        for request in left:
            traces.append(Trace(CLOCK.now()))
            await client.run(request, traces[-1])

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return traces


async def static_batches(client: Client, requests: list[LoadRequest], size: int) -> list[Trace]:
    """Batches of `size`; the next one starts when all of the last have ended."""
    traces: list[Trace] = []
    for i in range(0, len(requests), size):
        traces += await send_all(client, requests[i : i + size], [0.0] * len(requests[i : i + size]))
    return traces


def summary(traces: list[Trace], slo: tuple[float, float]) -> dict[str, Any]:
    """Figures of the finished requests, in milliseconds. `seconds`: from the first due time to the last token."""
    good = [t for t in traces if not t.error and t.times]
    if not good:
        return {"requests": len(traces), "failed": len(traces)}
    seconds = max(t.times[-1] for t in good) - min(t.due for t in traces)
    within = [t for t in good if t.ttft * 1e3 <= slo[0] and t.tpot * 1e3 <= slo[1]]
    gaps = [1e3 * (b - a) for t in good for a, b in zip(t.times, t.times[1:], strict=False)]
    return {
        "requests": len(traces),
        "failed": len(traces) - len(good),
        "seconds": round(seconds, 2),
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": sum(t.tokens for t in good) / seconds,
        "goodput_requests_per_s": len(within) / seconds,
        "within_slo": len(within) / len(traces),
        "ttft_ms": percentiles([1e3 * t.ttft for t in good]),
        "tpot_ms": percentiles([1e3 * t.tpot for t in good]),
        "inter_token_ms": percentiles(gaps),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{round(100 * s)}": round(percentile(values, s), 2) for s in PERCENTILES} if values else {}


async def concurrency_part(client: Client, work: Workload, slo, static: bool) -> list[dict[str, Any]]:
    rows = []
    for n in work.args.concurrency:
        requests = work.requests(work.args.rounds * n, n)
        kinds: dict[str, Callable] = {"continuous": closed_loop} | ({"static": static_batches} if static else {})
        for kind, run in kinds.items():
            row = {"concurrency": n, "batching": kind, **summary(await run(client, requests, n), slo)}
            if "inter_token_ms" in row:
                row["inter_token_steps"] = work.in_steps(row["inter_token_ms"], n)
                row["ideal"] = work.ideal(requests, n).to_dict(row["tokens_per_s"])
            rows.append(row)
    return rows


async def poisson_part(client: Client, work: Workload, slo, capacity: float) -> list[dict[str, Any]]:
    """Arrivals at fractions of `capacity`, in requests/s."""
    rows, seconds = [], work.args.poisson_seconds
    for load in work.args.loads:
        rng, rate, due, now = random.Random(f"{work.args.seed} {load}"), load * capacity, [], 0.0
        requests = work.requests(max(1, round(rate * seconds)) if seconds else work.args.requests, 10**6)
        for _ in requests:
            due.append(now)
            now += rng.expovariate(rate)
        row = {"load": load, "rate": rate, **summary(await send_all(client, requests, due), slo)}
        if "tokens_per_s" in row:
            row["ideal"] = work.ideal(requests, work.slots, due).to_dict(row["tokens_per_s"])
        rows.append(row)
    return rows


async def join_part(client: Client, work: Workload) -> dict[str, Any]:
    """`--join-streams` requests decode, then a long prompt joins: gaps between tokens before, and while it joins."""
    args, rng = work.args, random.Random(work.args.seed)
    length = min(args.long_prompt, work.max_seq_len - 2)
    new = work.max_seq_len - args.prompt_tokens - 1
    others = [LoadRequest(work.request(rng, args.prompt_tokens, 1).prompt, new) for _ in range(args.join_streams)]
    traces = [Trace(CLOCK.now()) for _ in others]
    tasks = [asyncio.create_task(client.run(a, t)) for a, t in zip(others, traces, strict=True)]
    while not all(len(t.times) > 1 for t in traces):
        if any(task.done() for task in tasks):
            sys.exit(f"join: a stream ended early ({[t.error for t in traces if t.error] or 'no reason given'}).")
        await asyncio.sleep(0.01)
    begin = CLOCK.now()
    await asyncio.sleep(args.join_seconds)
    long = Trace(CLOCK.now())
    await client.run(work.request(rng, length, 1), long)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    def gaps(since: float, until: float) -> dict[str, float]:
        found = [
            1e3 * (b - a) for t in traces for a, b in zip(t.times, t.times[1:], strict=False) if since < b <= until
        ]
        return {"gaps": len(found), **percentiles(found)}

    return {
        "streams": len(others),
        "prompt_tokens": length,
        "ttft_ms": round(1e3 * long.ttft, 1),
        "step_ms": round(1e3 * work.speeds.step(len(others)), 3),
        "before_ms": gaps(begin, long.due),
        "while_it_joins_ms": gaps(long.due, long.times[0]),
    }


async def warm_up(client: Client, work: Workload) -> None:
    """Run every power of two of requests at once, since decode's CUDA graphs are captured at first use."""
    rng, most, n = random.Random(99), max(*work.args.concurrency, work.args.join_streams + 1), 1
    while True:
        await closed_loop(client, [work.request(rng, 16, 4) for _ in range(n)], n)
        if n >= most:
            return
        n = min(2 * n, most)


def measure(client: Client, work: Workload, result: dict[str, Any], keep: Callable[[], None]) -> None:
    """`keep` is called after each part."""
    slo = (work.args.slo_ttft_ms, work.args.slo_tpot_ms)

    async def all_parts() -> None:
        await warm_up(client, work)
        result["concurrency"] = await concurrency_part(client, work, slo, static=True)
        keep()
        capacity = max(r["requests_per_s"] for r in result["concurrency"] if r["batching"] == "continuous")
        result["poisson"] = await poisson_part(client, work, slo, capacity)
        keep()
        result["join"] = await join_part(client, work)
        keep()

    asyncio.run(all_parts())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3, help="requests per running request, in the concurrency part")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.1], help="fractions of the throughput")
    parser.add_argument("--requests", type=int, default=60, help="in each Poisson run")
    parser.add_argument("--poisson-seconds", type=float, help="instead of --requests: arrivals for this long")
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0)
    parser.add_argument("--long-prompt", type=int, default=32768, help="at most max_seq_len - 2")
    parser.add_argument("--join-streams", type=int, default=4)
    parser.add_argument("--join-seconds", type=float, default=2.0)
    parser.add_argument("--held-tokens", type=int, help="of the steps timed; default: prompt and half of the output")
    add_sampling(parser)
    add_serving(parser)
    parser.add_argument("--http", action="store_true", help="through jet-export serve --openai on loopback")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: see load_clients.Clock")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    CLOCK.cpu = args.clock == "cpu"
    if CLOCK.cpu and args.http:
        sys.exit("--clock cpu counts this process's time; with --http the engine is in another.")
    serving = serving_of(args)
    load = os.getloadavg()
    manifest = Manifest.load(args.bundle)
    engine, _ = load_engine(args.bundle)
    speeds = speeds_of(engine, args)
    work = Workload(
        args, manifest.config.vocab_size, manifest.limits.max_seq_len, speeds, manifest.limits.max_batch_size
    )
    result: dict[str, Any] = {
        "command": " ".join(["python", *(a if a != str(args.bundle) else args.bundle.name for a in sys.argv)]),
        "model": manifest.model["name"],
        "precision": "fp8" if manifest.quantization else manifest.dtype,
        "limits": asdict(manifest.limits),
        "speeds": asdict(speeds),
        "sampling": sampling_of(params_of(args, 1)),
        "through": "http" if args.http else "AsyncLLM",
        "clock": args.clock,
    }
    slo = (args.slo_ttft_ms, args.slo_tpot_ms)
    result["slo_ms"] = {"ttft": slo[0], "tpot": slo[1]}

    def keep() -> None:
        result["load_average"] = {"before": load, "after": os.getloadavg()}
        write_result(args.output, result)

    if args.http:
        device = engine.device
        del engine
        free_cached(device)  # for the server
        with http_server(args.bundle, serve_arguments(args)) as (url, model):
            measure(Http(url, model), work, result, keep)
    else:
        tokenizer = load_tokenizer(args.bundle)
        with InProcess(engine, tokenizer, serving) as client:
            measure(client, work, result, keep)
        with InProcess(engine, tokenizer, replace(serving, deterministic=True, mixed_prefill=None)) as client:
            asyncio.run(warm_up(client, work))
            rows = asyncio.run(concurrency_part(client, work, slo, static=False))
        result["deterministic"] = [{**r, "batching": "deterministic"} for r in rows]
    failed = sum(r["failed"] for part in ("concurrency", "poisson") for r in result[part])
    print_tables(result, slo)
    keep()
    if failed:
        sys.exit(f"{failed} requests failed.")


if __name__ == "__main__":
    main()
