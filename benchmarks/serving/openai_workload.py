"""workload.py's requests against any OpenAI-compatible server (jet-export, vLLM, SGLang), to repeat a comparison.

    python benchmarks/serving/openai_workload.py http://127.0.0.1:8000 --model NAME [--concurrency 64]

Prompts go as token ids to /v1/completions, streamed, end-of-sequence tokens ignored (`ignore_eos`, which all three
know); --vocab: ids are below it (default 150,000). --concurrency requests are open at once, the next is sent when one
ends; 0: all at once, so that the server's own queue decides. --processes share them, so that reading 10,000 events a
second does not limit the server: add some while the figure rises. Tokens are counted by the server's `usage`; a
server that answers a request with fewer than asked gives no figure. Times between the chunks that bring text.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from serving_options import response_format
from workload import KINDS, Request, requests

from jet_export.bench.timer import percentile
from jet_export.utils.environment import write_result


@dataclass
class Answer:
    """The answer to one request."""

    chunks: list[float] = field(default_factory=list)  # seconds, when each chunk came
    tokens: int = 0  # by the server's usage
    error: str = ""


def body_of(model: str, kind: str, request: int, prompt: list[int], new: int) -> dict[str, Any]:
    options = dict(KINDS[kind])
    sampling = {"temperature": 0.0, **options.pop("sampling", {})}
    if "grammar" in options:
        options["response_format"] = response_format(options.pop("grammar"))
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": new,
        "ignore_eos": True,
        "seed": request,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
        **options,
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    answer = Answer()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("choices"):
                    answer.chunks.append(time.perf_counter())
                if event.get("usage"):
                    answer.tokens = event["usage"]["completion_tokens"]
    except httpx.HTTPError as e:
        answer.error = f"{type(e).__name__}: {e}"
    return answer


async def send(url: str, bodies: list[dict[str, Any]], concurrency: int, timeout: float) -> tuple[float, list[Answer]]:
    """When it began, and the answers."""
    room = asyncio.Semaphore(concurrency or len(bodies))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:

        async def one(body: dict[str, Any]) -> Answer:
            async with room:
                return await ask(client, body)

        START.wait()
        start = time.perf_counter()
        return start, await asyncio.gather(*map(one, bodies))


START: Any = None  # the barrier at which the processes meet before they send


def meet_at(barrier: Any) -> None:
    global START
    START = barrier


def run_share(arguments: tuple[Any, ...]) -> tuple[float, list[Answer]]:
    return asyncio.run(send(*arguments))


def run(
    pool: Any, processes: int, url: str, bodies: list[dict[str, Any]], concurrency: int, timeout: float
) -> tuple[float, list[Answer]]:
    """When the first process began (they share the system's monotonic clock), and the answers in order."""
    shares = [(url, bodies[i::processes], -(-concurrency // processes), timeout) for i in range(processes)]
    found = pool.map(run_share, shares, chunksize=1)
    answers: list[Any] = [None] * len(bodies)
    for i, (_, share) in enumerate(found):
        answers[i::processes] = share
    return min(start for start, _ in found), answers


def summary(start: float, answers: list[Answer], work: list[Request]) -> dict[str, float]:
    """Figures of complete answers; SystemExit naming the first that is not."""
    for i, (answer, (_, new)) in enumerate(zip(answers, work, strict=True)):
        if answer.error or answer.tokens != new:
            raise SystemExit(f"request {i}: {answer.error or f'{answer.tokens} of {new} tokens'}; no figure is given")
    gaps = [1e3 * (b - a) for answer in answers for a, b in itertools.pairwise(answer.chunks)] or [0.0]
    tokens = sum(answer.tokens for answer in answers)
    seconds = max(answer.chunks[-1] for answer in answers) - start
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "between_chunks_ms_p50": round(statistics.median(gaps), 2),
        "between_chunks_ms_p95": round(percentile(gaps, 0.95), 2),
        "ttft_ms_p50": round(1e3 * statistics.median(answer.chunks[0] - start for answer in answers), 1),
    }


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['kind']:18} {row['tokens_per_s']:9,.0f} tokens/s, between chunks p50 {row['between_chunks_ms_p50']:.2f} "
        f"p95 {row['between_chunks_ms_p95']:.2f} ms, first after {row['ttft_ms_p50']:.0f} ms (p50)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--kinds", default="greedy,temperature 1,t 0.8 top_p 0.95,t 0.8 top_k 50")
    parser.add_argument("--processes", type=int, default=4, help="at most --concurrency")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of silence of the server")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = requests(options.requests, options.vocab)
    rows = []
    processes = max(1, min(options.processes, options.concurrency or len(work), len(work)))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(processes, meet_at, (spawn.Barrier(processes),)) as pool:
        for kind in options.kinds.split(","):
            bodies = [body_of(options.model, kind, i, prompt, new) for i, (prompt, new) in enumerate(work)]
            start, answers = run(pool, processes, options.url, bodies, options.concurrency, options.timeout)
            rows.append({"kind": kind, **summary(start, answers, work)})
            print(line_of(rows[-1]), flush=True)
    if options.output:
        about = {"url": options.url, "model": options.model, "concurrency": options.concurrency, "processes": processes}
        write_result(options.output, {**about, "requests": len(work), "rows": rows})


if __name__ == "__main__":
    main()
