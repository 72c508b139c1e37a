"""Times an engine's prefill and decode at given batches and contexts, for `jet-export bench` and the search.

A case fills `batch` sequences with `context` tokens, chunk by chunk, then decodes `new_tokens` more greedily, the whole
batch in every step. Where filling would take too long, the states are noise of realistic size instead ("synthetic");
prefill is then timed at both ends of the context, since a chunk's time is affine in the tokens before it.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.bench.timer import Timing, percentile, stopwatch, summary
from jet_export.bundle.limits import MAX_PREFILL_TOKENS, Limits
from jet_export.bundle.memory import free_cached
from jet_export.runtime.runner import Runner
from jet_export.utils.errors import JetExportError

FILLS = ("auto", "prefill", "synthetic")
DROPPED = 8  # first decode steps, not counted
PROBES = 3  # prefill calls timed at each end of a synthetic context
NOISE_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to run. fill: "prefill", "synthetic", or "auto": prefill unless it takes over `fill_seconds`."""

    batch: int
    context: int  # tokens that each sequence holds when decoding begins
    chunk: int  # most tokens of one sequence in one prefill call
    new_tokens: int = 128
    fill: str = "auto"
    repeats: int = 1  # fills, decoding after the last; fewer where they would take over `fill_seconds`

    @property
    def tokens(self) -> int:
        return self.context + self.new_tokens

    @property
    def sequences_per_call(self) -> int:
        return max(1, MAX_PREFILL_TOKENS // self.chunk)

    @property
    def prefill_calls(self) -> int:
        """Calls of one fill."""
        return -(-self.batch // self.sequences_per_call) * -(-self.context // self.chunk)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The times of one case, in milliseconds."""

    case: Case
    filled_by: str  # "prefill" or "synthetic"
    prefill_tokens_per_s: float  # of all sequences together, over the whole context
    prefill_call: Timing  # one call of up to MAX_PREFILL_TOKENS tokens
    step: Timing  # one decode step of the whole batch
    decode_tokens_per_s: float  # of all sequences together, over all timed steps
    ttft: tuple[float, ...]  # of every sequence of every fill, all arriving at once; empty where synthetic
    state_bytes: int  # states and caches
    peak_bytes: int | None  # of the process, on a GPU; None on a CPU

    @property
    def ttft_p50(self) -> float | None:
        return statistics.median(self.ttft) if self.ttft else None

    @property
    def ttft_p99(self) -> float | None:
        return percentile(list(self.ttft), 0.99) if self.ttft else None


def check_case(case: Case, limits: Limits) -> str | None:
    """Why a case does not fit an engine's limits; None where it does."""
    if case.batch > limits.max_batch_size:
        return f"batch {case.batch} exceeds max_batch_size {limits.max_batch_size}"
    if case.tokens > limits.max_seq_len:
        return f"context {case.context} and {case.new_tokens} new tokens exceed max_seq_len {limits.max_seq_len}"
    if case.chunk > limits.prefill_chunk:
        return f"chunk {case.chunk} exceeds prefill_chunk {limits.prefill_chunk}"
    return None


def measure_engine(
    engine: Engine, cases: Sequence[Case], seed: int = 0, fill_seconds: float = 60.0, cuda_graphs: bool = True
) -> list[Measurement]:
    """Time every case on fresh pools. Raises JetExportError for a case that does not fit the engine's limits."""
    for case in cases:
        reason = check_case(case, engine.limits)
        if reason or min(case.batch, case.context, case.chunk, case.repeats) < 1 or case.new_tokens < 2:
            raise JetExportError(f"benchmark: {reason or f'{case}: sizes must be positive'}.")
        if case.new_tokens <= engine.state_interval > 1:
            raise JetExportError(
                f"benchmark: {case.new_tokens} new tokens; states are written every {engine.state_interval} tokens, "
                "and decode is timed over whole intervals.",
                f"Decode at least {engine.state_interval + 1}: the first step after a prompt never writes.",
            )
        if case.fill not in FILLS:
            raise JetExportError(f"benchmark: fill {case.fill!r} is not known.", f"Known: {', '.join(FILLS)}.")
    return [measure_case(engine, case, seed, fill_seconds, cuda_graphs) for case in cases]


def measure_case(engine: Engine, case: Case, seed: int, fill_seconds: float, cuda_graphs: bool) -> Measurement:
    """Time one case, on pools of its size."""
    free_cached(engine.device)  # the pools and graphs of the case before
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    run = Run(engine, case, seed, cuda_graphs)
    run.warm_up()
    filled, fill = "synthetic", None
    if case.fill != "synthetic":
        fill = run.fill(fill_seconds if case.fill == "auto" else float("inf"))
    if fill is not None:
        filled = "prefill"
        calls, ttft = fill
        seconds = sum(calls) / 1e3 / (len(calls) / case.prefill_calls)
    else:
        calls, ttft = run.probe_prefill(), []
        first, last = run.probed_tokens()
        ends = statistics.median(calls[:PROBES]) / first, statistics.median(calls[PROBES:]) / last  # ms a token
        seconds = statistics.mean(ends) / 1e3 * case.batch * case.context
    steps = run.decode()
    step = summary(steps)
    cuda = engine.device.type == "cuda"
    return Measurement(
        case=case,
        filled_by=filled,
        prefill_tokens_per_s=case.batch * case.context / seconds,
        prefill_call=summary(calls),
        step=step,
        decode_tokens_per_s=case.batch / (statistics.mean(steps) * 1e-3),
        ttft=tuple(ttft),
        state_bytes=sum(s.nbytes for s in run.runner.states),
        peak_bytes=torch.cuda.max_memory_allocated(engine.device) if cuda else None,
    )


class Run:
    """One case's pools and random tokens, and the timed parts of it."""

    def __init__(self, engine: Engine, case: Case, seed: int, cuda_graphs: bool) -> None:
        self.case, self.device, self.interval = case, engine.device, engine.state_interval
        self.specs = engine.specs
        engine = copy.copy(engine)
        engine.limits = Limits(max_batch_size=case.batch, max_seq_len=case.tokens, prefill_chunk=case.chunk)
        self.runner = Runner(engine, cuda_graphs)
        self.slots = list(range(case.batch))
        rng = torch.Generator().manual_seed(seed)
        self.vocab_size = engine.config.vocab_size
        self.ids = torch.randint(self.vocab_size, (case.batch, case.context), generator=rng)
        self.noise = torch.Generator(device=self.device).manual_seed(seed)
        self.next = torch.zeros(case.batch, dtype=torch.int64, device=self.device)

    def calls(self) -> Iterator[tuple[list[int], int, int]]:
        """Slots, first token and end of every prefill call of one fill: all sequences' first chunks, then their second,
        and so on, in calls of up to MAX_PREFILL_TOKENS."""
        group = self.case.sequences_per_call
        for begin in range(0, self.case.context, self.case.chunk):
            for i in range(0, self.case.batch, group):
                yield self.slots[i : i + group], begin, min(begin + self.case.chunk, self.case.context)

    def prefill(self, slots: list[int], begin: int, end: int) -> None:
        logits = self.runner.prefill(slots, self.ids[slots, begin:end].tolist())
        self.next[slots[0] : slots[-1] + 1] = logits.argmax(-1)

    def reset(self, context: int = 0) -> None:
        for slot in self.slots:
            self.runner.hold(slot, context)

    def warm_up(self) -> None:
        """One call of each kind, for lazy initialisation and CUDA graph capture."""
        self.prefill(*next(self.calls()))
        self.reset(1)
        self.runner.decode(self.slots, self.next)
        self.reset()

    def fill(self, seconds: float) -> tuple[list[float], list[float]] | None:
        """Milliseconds of every call, and every sequence's time to first token; None where a fill takes too long."""
        calls, ttft = [], []
        begin, total = time.monotonic(), self.case.prefill_calls
        for i in range(self.case.repeats):
            if i and (time.monotonic() - begin) * (i + 1) / i > seconds:
                break
            self.reset()
            spent = 0.0
            for slots, first, end in self.calls():
                calls.append(stopwatch(partial(self.prefill, slots, first, end), self.device))
                spent += calls[-1]
                if end == self.case.context:
                    ttft += [spent] * len(slots)
                done, elapsed = len(calls), time.monotonic() - begin
                if i == 0 and elapsed * total / done > seconds and done >= min(PROBES, total):
                    return None
        return calls, ttft

    def synthesise(self) -> None:
        """Fill every pool with noise, as if the sequences held `context` tokens, prefilled."""
        for spec, pool in zip(self.specs, self.runner.states, strict=True):
            if spec.name.endswith(".state_position"):
                continue
            rows = max(1, NOISE_BYTES // max(1, pool[0].numel() * 4))
            block = torch.randn(min(rows, len(pool)), *pool.shape[1:], generator=self.noise, device=self.device)
            block = (0.1 * block if pool.dtype == torch.float32 else block).to(pool.dtype)
            for part in torch.split(pool, rows):
                part.copy_(block[: len(part)])
        self.reset_written()

    def reset_written(self) -> None:
        """As behind a prefill of the context: states hold all of it, and no tokens are held beside them."""
        self.reset(self.case.context)
        for spec, pool in zip(self.specs, self.runner.states, strict=True):
            if spec.name.endswith(".state_position"):
                pool.fill_(self.case.context)

    def probe_prefill(self) -> list[float]:
        """Milliseconds of prefill calls on synthetic states, PROBES at each end of the context."""
        self.synthesise()
        every = list(self.calls())
        times = []
        for slots, begin, end in (every[0], every[-1]):
            for _ in range(PROBES):
                self.reset(begin)
                times.append(stopwatch(partial(self.prefill, slots, begin, end), self.device))
        self.reset_written()
        return times

    def probed_tokens(self) -> tuple[int, int]:
        """Packed tokens of the calls that `probe_prefill` times: the first and the last."""
        every = list(self.calls())
        first, last = (len(slots) * (end - begin) for slots, begin, end in (every[0], every[-1]))
        return first, last

    def decode(self) -> list[float]:
        """Milliseconds of decode steps (the engine and the argmax): the first ones are dropped, as many as leave whole
        intervals between two writes of the states, of whose steps all but one are cheap. The first step finds a state
        that the prompt has just left written, which no later one does."""
        tokens: Tensor = self.next

        def step() -> None:
            nonlocal tokens
            tokens = self.runner.decode(self.slots, tokens).argmax(-1)

        times = [stopwatch(step, self.device) for _ in range(self.case.new_tokens)]
        most = min(len(times) - min(DROPPED, len(times) // 2), len(times) - (self.interval > 1))
        return times[-max(most - most % self.interval, self.interval) :]
