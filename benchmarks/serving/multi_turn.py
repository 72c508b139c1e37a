"""Conversations of several turns: time to first token by turn, through the prefix cache.

    python benchmarks/serving/multi_turn.py BUNDLE [--conversations 8] [--turns 8] [--output FILE]
    python benchmarks/serving/multi_turn.py http://127.0.0.1:8000 --model NAME

Every turn sends all that was said before and --turn-tokens random ids more, and gets --output-tokens, end-of-sequence
tokens ignored; all conversations send a turn at the same moment, and the next one when every answer is complete. With a
cache of what was said before, the first token of the last turn comes as soon as that of the first turn. Times also as
multiples of a plain decode step of as many rows as there are conversations, measured first in this process. One set of
conversations runs unmeasured before, for CUDA graphs.

With a bundle, AsyncLLM, in this process. With an address, token ids go to /v1/completions of any OpenAI-compatible
server, whose answers have no ids: random ones take their place in what the next turn sends, so that a cache has the
turn before only to the end of its prompt; the step is then the median time between chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from load_clients import CLOCK, Client, Http, InProcess, LoadRequest, Trace
from serving_options import add_sampling, add_serving, given_serving, params_of, sampling_of, serving_of

from jet_export.backends.load import load_engine
from jet_export.bench.ideal import measure_speeds
from jet_export.runtime.params import Params
from jet_export.runtime.tokenizer import load_tokenizer
from jet_export.utils.environment import write_result


@dataclass(frozen=True, kw_only=True)
class Shape:
    conversations: int
    turns: int
    turn_tokens: int  # new in each prompt
    output_tokens: int  # of each answer

    @property
    def tokens(self) -> int:
        """Of one conversation in the end."""
        return self.turns * (self.turn_tokens + self.output_tokens)


async def converse(client: Client, shape: Shape, params: Params, vocab: int, seed: int) -> list[list[Trace]]:
    """The traces of every turn, one of each conversation. SystemExit for an answer that is not complete."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(n)]

    history: list[list[int]] = [[] for _ in range(shape.conversations)]
    turns = []
    for turn in range(shape.turns):
        for said in history:
            said += ids(shape.turn_tokens)
        # A copy: the client may still hold it when the answer is added.
        requests = [LoadRequest(list(said), shape.output_tokens, params) for said in history]
        traces = [Trace(CLOCK.now()) for _ in requests]
        await asyncio.gather(*(client.run(r, t) for r, t in zip(requests, traces, strict=True)))
        for said, trace in zip(history, traces, strict=True):
            if trace.error or trace.tokens != shape.output_tokens:
                why = trace.error or f"{trace.tokens} of {shape.output_tokens} tokens"
                sys.exit(f"turn {turn + 1}: {why}; no figure is given")
            said += trace.ids or ids(shape.output_tokens)
        turns.append(traces)
    return turns


def gaps(traces: list[Trace]) -> list[float]:
    """Milliseconds between tokens."""
    return [1e3 * (b - a) for trace in traces for a, b in pairwise(trace.times)]


def summary(sets: list[list[list[Trace]]], shape: Shape, step_ms: float) -> list[dict[str, Any]]:
    """A row for each turn, of all sets of conversations together. `step_ms`: a plain decode step."""
    rows = []
    for turn, of_sets in enumerate(zip(*sets, strict=True)):
        traces = [trace for traces in of_sets for trace in traces]
        ttft = [1e3 * trace.ttft for trace in traces]
        p50, most = statistics.median(ttft), max(ttft)
        between = gaps(traces)
        rows.append(
            {
                "turn": turn + 1,
                "prompt_tokens": turn * (shape.turn_tokens + shape.output_tokens) + shape.turn_tokens,
                "ttft_ms_p50": round(p50, 2),
                "ttft_ms_max": round(most, 2),
                "ttft_steps_p50": round(p50 / step_ms, 2),
                "ttft_steps_max": round(most / step_ms, 2),
                "between_tokens_ms_p50": round(statistics.median(between), 2) if between else 0.0,
            }
        )
    return rows


def later(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how many plain steps the last turn's first token comes later than that of the first turn."""
    return {p: round(rows[-1][f"ttft_steps_{p}"] - rows[0][f"ttft_steps_{p}"], 2) for p in ("p50", "max")}


def run_sets(
    client: Client, shape: Shape, args: argparse.Namespace, vocab: int, saved: Callable[[], int]
) -> tuple[list[list[list[Trace]]], int]:
    """Every set but the first, and the prompt tokens that a cache `saved` in them."""
    params = params_of(args, shape.output_tokens)

    async def everything() -> tuple[list[list[list[Trace]]], int]:
        await converse(client, shape, params, vocab, -1)
        before = saved()
        return [await converse(client, shape, params, vocab, i) for i in range(args.repeats)], saved() - before

    return asyncio.run(everything())


def with_bundle(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    engine, manifest = load_engine(Path(args.target))
    if shape.tokens > engine.limits.max_seq_len:
        sys.exit(f"A conversation ends with {shape.tokens} tokens; max_seq_len is {engine.limits.max_seq_len}.")
    rows = min(shape.conversations, args.slots or engine.limits.max_batch_size)
    speeds = measure_speeds(engine, [rows], held_tokens=shape.tokens // 2)
    with InProcess(engine, load_tokenizer(args.target), serving_of(args)) as client:
        metrics = client.llm.batching.metrics
        sets, saved = run_sets(client, shape, args, engine.config.vocab_size, lambda: metrics.prefix_tokens)
    return {
        "model": manifest.model["name"],
        "precision": "fp8" if manifest.quantization else manifest.dtype,
        "limits": asdict(manifest.limits),
        "serving": given_serving(args),
        "speeds": asdict(speeds),
        "step_ms": speeds.step_ms[rows],
        "prompt_tokens_cached": saved,
        "turns": summary(sets, shape, speeds.step_ms[rows]),
    }


def with_server(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    if not args.model:
        sys.exit("--model: the name by which the server knows its model.")
    sets, _ = run_sets(Http(args.target.rstrip("/"), args.model), shape, args, args.vocab, lambda: 0)
    step_ms = statistics.median(gaps([trace for turns in sets for traces in turns for trace in traces]))
    return {"url": args.target, "model": args.model, "step_ms": step_ms, "turns": summary(sets, shape, step_ms)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a bundle, or the address of an OpenAI-compatible server")
    parser.add_argument("--model", help="with an address: the model's name there")
    parser.add_argument("--vocab", type=int, default=150_000, help="with an address: ids are below it")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn-tokens", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="sets of conversations")
    parser.add_argument("--output", type=Path)
    add_sampling(parser)
    add_serving(parser, prefix_cache=None)  # the runtime's own default
    return parser.parse_args()


def main() -> None:
    args = parse()
    shape = Shape(
        conversations=args.conversations,
        turns=args.turns,
        turn_tokens=args.turn_tokens,
        output_tokens=args.output_tokens,
    )
    result = (with_server if args.target.startswith("http") else with_bundle)(args, shape)
    result |= {"later_steps": later(result["turns"]), "sampling": sampling_of(params_of(args, 1))}
    print(f"{shape.conversations} conversations at once; a plain decode step: {result['step_ms']:.2f} ms")
    for row in result["turns"]:
        print(
            f"turn {row['turn']}, prompt of {row['prompt_tokens']:5} tokens: first token after p50 "
            f"{row['ttft_ms_p50']:.1f} ms ({row['ttft_steps_p50']:.1f} steps), at most {row['ttft_ms_max']:.1f} ms "
            f"({row['ttft_steps_max']:.1f})"
        )
    if "prompt_tokens_cached" in result:
        print(f"prompt tokens from the cache: {result['prompt_tokens_cached']:,}")
    p50, most = result["later_steps"].values()
    print(f"the last turn's first token comes {p50:+.1f} steps later than the first turn's (p50; at most: {most:+.1f})")
    if args.output:
        write_result(args.output, {"shape": asdict(shape), "sets": args.repeats, **result})


if __name__ == "__main__":
    main()
