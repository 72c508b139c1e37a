"""What a prompt's call takes as serving makes it: one packed call, on a GPU a captured one (runtime/calls.py).

A case's prefill (measure.py) fills many sequences in plain calls, which the host launches; of a short call that is most
of the time, and nobody who is served waits for it. The simulator needs the times of these calls.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jet_export.backends.base import Engine
from jet_export.bench.timer import compare, stopwatch
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import free_cached
from jet_export.runtime.calls import MAX_TOKENS
from jet_export.runtime.pacing import SPARE
from jet_export.runtime.runner import Runner

SIZES = (64, 128, 256, 512, 1024)  # tokens, and the longest
SEQUENCES = 8  # that a captured call has room for at least
REPEATS, TOGETHER = 7, 4
LONG = 1000.0  # milliseconds of a call that is timed once


@dataclass(frozen=True, kw_only=True)
class PromptCall:
    """The first tokens of one prompt in a call of their own."""

    tokens: int
    ms: float


def prompt_sizes(longest: int) -> list[int]:
    """Up to `longest` tokens, or up to those of the longest captured call; two sizes or more, unless that is 1."""
    longest = min(longest, MAX_TOKENS - SPARE)
    sizes = {n for n in SIZES if n < longest} | {longest}
    return sorted(sizes if len(sizes) > 1 else {max(1, longest // 2), longest})


@torch.inference_mode()
def measure_prompt_calls(engine: Engine, longest: int, seed: int = 0) -> list[PromptCall]:
    """Calls of up to `longest` tokens of one prompt, at most the engine's chunk; the median of REPEATS each."""
    free_cached(engine.device)
    sizes = prompt_sizes(min(longest, engine.limits.prefill_chunk, engine.limits.max_seq_len - 1))
    small, most = copy.copy(engine), sizes[-1] + 1
    small.limits = Limits(
        max_batch_size=min(SEQUENCES, engine.limits.max_batch_size),
        max_seq_len=most,
        prefill_chunk=min(engine.limits.prefill_chunk, most),
    )
    runner = Runner(small)
    rng = torch.Generator().manual_seed(seed)
    out = []
    for n in reversed(sizes):  # the longest captured call first: the others fit its memory
        ids = torch.randint(engine.config.vocab_size, (n,), generator=rng).tolist()
        out.append(PromptCall(tokens=n, ms=_median(runner, ids)))
    return out[::-1]


def _median(runner: Runner, ids: list[int]) -> float:
    """Milliseconds of a call, of TOGETHER launched one behind the other on a GPU, as serving does."""
    together = TOGETHER if runner.device.type == "cuda" else 1

    def calls() -> None:
        for _ in range(together):
            runner.reset(0)
            runner.mixed([0], [ids])

    calls()  # captures or compiles
    first = stopwatch(calls, runner.device) / together  # warms up
    if first >= LONG:
        return first
    return compare({"": calls}, repeats=REPEATS, warmup=0, calls=together, device=runner.device)[""].median


def describe(calls: Sequence[PromptCall]) -> str:
    return "ms of a prompt's call by its tokens: " + ", ".join(f"{c.tokens}: {c.ms:.3g}" for c in calls)
