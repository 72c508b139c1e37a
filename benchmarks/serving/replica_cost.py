"""What Ray Serve in front of one replica costs, against plain `jet-export serve` of the same bundle.

    python benchmarks/serving/replica_cost.py BUNDLE --output benchmarks/results/cpu/replica-cost.json

Both servers run, and are asked in turns: --streams requests at once over HTTP with Server-Sent Events, each of
--prompt-tokens random ids and exactly --output-tokens answered; then requests of one token, one after the other. The
rate is of a whole round; TTFT "alone" is of those without company. What is asked: a rate of at least 90 % of the plain
server's, and TTFT alone at most 10 ms more. Where the engine leaves no core for it, as on a CPU, Ray's share of the
machine is in the figures too; the load average of the minute before is in the result.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from load_clients import CLOCK, Http, LoadRequest, Trace, http_server

from jet_export.bench.timer import percentile
from jet_export.utils.environment import write_result

RATE, TTFT_MS = 0.9, 10.0  # what is asked
PLAIN, RAY = "plain", "ray"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def requests(rng: random.Random, count: int, prompt: int, new: int, vocab: int) -> list[LoadRequest]:
    return [LoadRequest([rng.randrange(vocab) for _ in range(prompt)], new) for _ in range(count)]


async def streams(client: Any, load: list[LoadRequest]) -> dict[str, float]:
    """All at once."""
    start = CLOCK.now()
    traces = [Trace(start) for _ in load]
    await asyncio.gather(*(client.run(r, t) for r, t in zip(load, traces, strict=True)))
    seconds = CLOCK.now() - start
    check(traces)
    ttft = [t.ttft for t in traces]
    return {"tokens_per_s": sum(t.tokens for t in traces) / seconds, "ttft_ms": 1e3 * percentile(ttft, 0.5)}


async def alone(client: Any, load: list[LoadRequest]) -> float:
    """Median milliseconds to the first token, one request after the other."""
    traces = []
    for r in load:
        traces.append(Trace(CLOCK.now()))
        await client.run(r, traces[-1])
    check(traces)
    return 1e3 * percentile([t.ttft for t in traces], 0.5)


def check(traces: list[Trace]) -> None:
    """Speeds of answers that are not whole are none."""
    if wrong := [t.error or "no token" for t in traces if t.error or not t.times]:
        sys.exit(f"{len(wrong)} requests failed: {wrong[0]}")


async def compare(clients: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A round of each, unmeasured, then --rounds of each in turns."""
    rows: list[dict[str, Any]] = []
    for n in range(args.rounds + 1):
        for name, client in clients.items():
            rng = random.Random(f"{args.seed} {n}")  # the same for both
            found = await streams(
                client, requests(rng, args.streams, args.prompt_tokens, args.output_tokens, args.vocab)
            )
            first = await alone(client, requests(rng, args.alone, args.prompt_tokens, 1, args.vocab))
            if n:
                rows.append({"server": name, "round": n, **found, "ttft_alone_ms": first})
                rate, ttft = found["tokens_per_s"], found["ttft_ms"]
                print(f"{name:6} {rate:9.1f} tokens/s, TTFT {ttft:8.1f} ms, alone {first:6.1f} ms", flush=True)
    return {"rows": rows, "summary": summary(rows)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds, and what is asked of them."""
    of = {
        name: {
            key: percentile([r[key] for r in rows if r["server"] == name], 0.5)
            for key in ("tokens_per_s", "ttft_ms", "ttft_alone_ms")
        }
        for name in (PLAIN, RAY)
    }
    rate = of[RAY]["tokens_per_s"] / of[PLAIN]["tokens_per_s"]
    more = of[RAY]["ttft_alone_ms"] - of[PLAIN]["ttft_alone_ms"]
    return {**of, "rate": rate, "ttft_alone_more_ms": more, "met": bool(rate >= RATE and more <= TTFT_MS)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=20, help="requests one after the other in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=256, help="prompts are of ids below it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse()
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        more = ["--max-waiting", str(args.streams), "--frontends", "1"]
        addresses = {
            PLAIN: stack.enter_context(http_server(args.bundle, more))[0],
            RAY: stack.enter_context(http_server(args.bundle, [*more, "--replicas", "1", "--port", str(free_port())]))[
                0
            ],
        }
        models = {n: httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] for n, url in addresses.items()}
        result = asyncio.run(compare({n: Http(url, models[n]) for n, url in addresses.items()}, args))
    s = result["summary"]
    met = "met" if s["met"] else "not met"
    print(f"Ray: {s['rate']:.1%} of the plain rate, TTFT alone {s['ttft_alone_more_ms']:+.1f} ms: {met}")
    if args.output:
        asked = {"rate": RATE, "ttft_more_ms": TTFT_MS}
        write_result(
            args.output,
            {**result, "asked": asked, "streams": args.streams, "cores": os.cpu_count(), "load_before": load},
        )


if __name__ == "__main__":
    main()
