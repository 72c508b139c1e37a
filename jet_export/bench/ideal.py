"""The ideal of continuous batching: what an engine's own speeds allow a list of requests.

A simulation over two measured speeds: a decode step at each batch size, and prompt tokens a second in calls of many
prompts (16 x 2048). At most `slots` requests run at once, first come first served. A request joins as soon as one has
ended; its prompt delays all others (no overlap), and brings its first token. Between joins everything that runs takes
decode steps. Nothing is charged for sampling, scheduling or the host. A mixed step reads the weights once for prompts
and decode, which the simulation does not, so that serving may exceed 100 % of the ideal.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from jet_export.backends.base import Engine
from jet_export.bench.measure import Case, Run
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import free_cached
from jet_export.utils.errors import JetExportError
from jet_export.utils.interpolate import interpolated

PROMPTS, PROMPT_TOKENS = 16, 2048  # of the call that gives the speed of prompts
STEPS, REPEATS = 8, 5  # decode steps launched together, and how often


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """An engine's own speeds, without a scheduler: the simulation's input."""

    step_ms: dict[int, float]  # batch size -> milliseconds of a decode step
    held_tokens: int  # that every sequence of those steps holds
    prompt_tokens_per_s: float
    prompt_shape: tuple[int, int]  # prompts and tokens of each, in the fill that gave prompt_tokens_per_s

    def __post_init__(self) -> None:
        if not self.step_ms or min(*self.step_ms, *self.step_ms.values(), self.prompt_tokens_per_s) <= 0:
            raise JetExportError(f"ideal: {self} has a size or speed that is not positive.", "Measure again.")

    @cached_property
    def _steps(self) -> list[tuple[float, float]]:
        return sorted(self.step_ms.items())

    def step(self, batch: int) -> float:
        """Seconds of a decode step; linear between the sizes measured, that of the nearest beyond them."""
        return 1e-3 * interpolated(self._steps, batch)

    def prompt(self, tokens: int) -> float:
        """Seconds of a prompt."""
        return tokens / self.prompt_tokens_per_s

    def describe(self) -> str:
        """Two lines."""
        steps = ", ".join(f"{n}: {ms:.3g}" for n, ms in self._steps)
        prompts = f"prompts of {' x '.join(map(str, self.prompt_shape))}: {self.prompt_tokens_per_s:,.0f} tokens/s"
        return f"ms a decode step by batch size, {self.held_tokens} tokens held: {steps}\n{prompts}"


@dataclass(frozen=True, kw_only=True)
class Ideal:
    """The outcome of a simulation."""

    seconds: float  # from the start to the last token, idle time included
    prompt_seconds: float
    decode_seconds: float
    steps: int
    most_at_once: int  # requests
    new_tokens: int
    prompt_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds

    def to_dict(self, achieved_tokens_per_s: float | None = None) -> dict[str, Any]:
        """As results record it; with the tokens/s that were achieved, also their share of the ideal."""
        out = {**asdict(self), "tokens_per_s": self.tokens_per_s}
        return out if achieved_tokens_per_s is None else {**out, "achieved": achieved_tokens_per_s / self.tokens_per_s}


def simulate(
    requests: Sequence[tuple[int, int]],  # prompt tokens and new tokens, each at least 1
    *,
    slots: int,
    speeds: Speeds,
    due: Sequence[float] | None = None,
) -> Ideal:
    """Run the requests at the engine's own speeds. `due`: when each arrives, in seconds, ascending; by default all are
    there at the start. Raises JetExportError for sizes below 1."""
    if slots < 1 or not requests or min(min(r) for r in requests) < 1:
        raise JetExportError(f"ideal: {slots} slots and {len(requests)} requests: every size must be at least 1.")
    due = due or [0.0] * len(requests)
    now = prompt_seconds = decode_seconds = 0.0
    steps = most = sent = 0
    ends: list[int] = []  # a heap: by how many steps each running request has its last token
    while sent < len(requests) or ends:
        while sent < len(requests) and len(ends) < slots and (due[sent] <= now or not ends):
            prompt, new = requests[sent]
            took = speeds.prompt(prompt)
            now = max(now, due[sent]) + took
            prompt_seconds += took
            sent += 1
            most = max(most, len(ends) + 1)
            if new > 1:
                heapq.heappush(ends, steps + new - 1)
        if ends:
            took = speeds.step(len(ends))
            now += took
            decode_seconds += took
            steps += 1
            while ends and ends[0] <= steps:
                heapq.heappop(ends)
    return Ideal(
        seconds=now,
        prompt_seconds=prompt_seconds,
        decode_seconds=decode_seconds,
        steps=steps,
        most_at_once=most,
        new_tokens=sum(new for _, new in requests),
        prompt_tokens=sum(prompt for prompt, _ in requests),
    )


def batch_sizes(slots: int) -> list[int]:
    """The sizes to measure up to `slots`: powers of two, the middles between those above 8, and `slots`."""
    powers = [1 << i for i in range(slots.bit_length())]
    return sorted({n for n in (*powers, *(3 * p // 2 for p in powers if p >= 8), slots) if n <= slots})


def measure_speeds(
    engine: Engine,
    sizes: Iterable[int],
    *,
    held_tokens: int,
    now: Callable[[], float] = time.perf_counter,
) -> Speeds:
    """Measure an engine on pools of its own, which are freed after: do this before or after serving, not during it.

    A decode step is one of `steps_together` launched together (on a GPU: replays of one CUDA graph of exactly that
    batch, and the argmax), the median of `REPEATS`, on states of noise that hold `held_tokens`. Prompts: 16 of 2,048
    tokens, or as many and as long as the engine's limits allow. `now`: seconds, by a clock that runs while the engine
    works. Raises JetExportError for sizes beyond the engine's limits.
    """
    limits = engine.limits
    held = max(1, min(held_tokens, limits.max_seq_len - steps_together(engine) - 1))
    if max(sizes := sorted(set(sizes))) > limits.max_batch_size:
        raise JetExportError(f"ideal: {max(sizes)} at once; the bundle's max_batch_size is {limits.max_batch_size}.")
    return Speeds(
        step_ms={n: 1e3 * _step_seconds(engine, n, held, now) for n in sizes},
        held_tokens=held,
        prompt_tokens_per_s=_prompt_speed(engine, shape := prompt_shape(limits), now),
        prompt_shape=shape,
    )


def steps_together(engine: Engine) -> int:
    """STEPS, or the next multiple of the tokens between two writes of the states."""
    return -(-STEPS // engine.state_interval) * engine.state_interval


def prompt_shape(limits: Limits) -> tuple[int, int]:
    """Prompts, and tokens of each: 16 x 2048 where the limits allow."""
    return min(PROMPTS, limits.max_batch_size), min(PROMPT_TOKENS, limits.max_seq_len - 2)


def _step_seconds(engine: Engine, batch: int, held: int, now: Callable[[], float]) -> float:
    free_cached(engine.device)
    together = steps_together(engine)
    case = Case(batch=batch, context=held, chunk=min(held, engine.limits.prefill_chunk), new_tokens=together + 1)
    run = Run(engine, case, seed=0, cuda_graphs=True)
    run.synthesise()
    tokens = run.runner.decode(run.slots, run.next).argmax(-1)  # captures the graph

    def steps() -> None:
        nonlocal tokens
        for _ in range(together):
            tokens = run.runner.decode(run.slots, tokens).argmax(-1)

    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        run.reset_written()
        times.append(_seconds(steps, engine.device, now) / together)
    return statistics.median(times[1:])


def _prompt_speed(engine: Engine, shape: tuple[int, int], now: Callable[[], float]) -> float:
    free_cached(engine.device)
    prompts, tokens = shape
    case = Case(batch=prompts, context=tokens, chunk=min(tokens, engine.limits.prefill_chunk), new_tokens=2)
    run = Run(engine, case, seed=0, cuda_graphs=False)

    def fill() -> None:
        for slots, begin, end in run.calls():
            run.prefill(slots, begin, end)

    times = []
    for _ in range(3 if engine.device.type == "cuda" else 2):  # the first warms up
        run.reset()
        times.append(_seconds(fill, engine.device, now))
    return prompts * tokens / min(times[1:])


def _seconds(work: Callable[[], None], device: torch.device, now: Callable[[], float]) -> float:
    """Of work on an idle device, to its end there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = now()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - begin
