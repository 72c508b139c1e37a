"""How long a step takes: fitted to a bench table's decode steps and prompt calls, with the fits' errors.

A decode step of B sequences is bench/predict.py's fit over the bytes that it moves. A prompt call:

    seconds = prompts(tokens) + sum over tokens of their position * position

where `prompts` goes through the calls that bench timed as serving makes them. A table without those has its prefill
speeds: call + tokens * prompt_token, too much for short calls, which the host launches there one kernel at a time. A
mixed step is a call of the prompts' tokens and one of each decoding row, and the weights are read once: beside the call
it takes what the decoding rows add to a decode step of none. Copies of
states (prefix cache, preemption) move their bytes at the decode fit's speed, or HOST_BYTES_PER_S to and from the host.
Sampling, the host and HTTP cost `step_overhead`, which no table holds; 0 unless it is given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jet_export.bench.measure import Case
from jet_export.bench.predict import StepTable, fit_alone, fit_steps, left_out_errors
from jet_export.bench.roofline import spaced_bytes, step_bytes
from jet_export.bench.rows import Row
from jet_export.bundle.dtypes import Dtypes
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError
from jet_export.utils.interpolate import interpolated

HOST_BYTES_PER_S = 20e9  # of pinned memory over PCIe, both ways
MIN_ROWS = 4  # decode steps of several sequences, to fit them apart from those of one


@dataclass(frozen=True, kw_only=True)
class Window:
    """The keys and values of sliding windows that a sequence's step reads."""

    token: float  # seconds a token held
    size: int  # tokens, at most

    def total(self, held: float, steps: int) -> float:
        """Seconds over `steps` steps of a sequence that holds `held` tokens in the first and one more in each."""
        if steps == 1:
            return self.token * min(held, self.size)
        growing = min(steps, max(0, math.ceil(self.size - held)))
        grown = growing * held + growing * (growing - 1) / 2
        return self.token * (grown + (steps - growing) * self.size)


@dataclass(frozen=True, kw_only=True)
class DecodeTimes:
    """Seconds of decode steps: an affine function of the sequences and of the tokens that they hold."""

    fixed: float  # of a step of several sequences: the overhead, and reading the weights
    fixed_alone: float  # the same of one sequence, which has a package of its own on a GPU
    sequence: float  # that each adds
    sequence_alone: float
    token: float  # that each token held adds: keys and values of full attention
    window: Window

    def total(self, sequences: int, held: float, steps: int = 1) -> float:
        """Seconds of `steps` steps of the same sequences, which hold `held` tokens together in the first."""
        alone = sequences == 1
        fixed = self.fixed_alone if alone else self.fixed
        each = self.sequence_alone if alone else self.sequence
        tokens = steps * held + sequences * (steps * (steps - 1) // 2)
        windows = sequences * self.window.total(held / sequences, steps) if self.window.token else 0.0
        return steps * (fixed + sequences * each) + self.token * tokens + windows


@dataclass(frozen=True, kw_only=True)
class PromptTimes:
    """Seconds of a prompt call by its tokens: linear between the known ones, beyond the last by their mean slope."""

    known: tuple[tuple[float, float], ...]  # (tokens, seconds), ascending

    @classmethod
    def affine(cls, call: float, token: float) -> PromptTimes:
        return cls(known=((0.0, call), (1024.0, call + 1024 * token)))

    @cached_property
    def slope(self) -> float:
        """Seconds a token."""
        (first, least), (last, most) = self.known[0], self.known[-1]
        return max(0.0, most - least) / (last - first) if last > first else most / last

    def seconds(self, tokens: int) -> float:
        return interpolated(self.known, tokens) + self.slope * max(0.0, tokens - self.known[-1][0])

    def left_out_errors(self) -> tuple[float, ...]:
        """Relative error of each between the first and the last, from its neighbours."""
        out = []
        for i, (tokens, seconds) in enumerate(self.known[1:-1], 1):
            near = interpolated((self.known[i - 1], self.known[i + 1]), tokens)
            out.append(abs(near - seconds) / seconds)
        return tuple(out)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of every kind of step."""

    decode: DecodeTimes
    prompts: PromptTimes
    position: float  # that each token before it adds to a prompt token
    byte: float  # a byte that is copied on the device
    step_overhead: float = 0.0  # of every step: sampling, and the host where it is waited for

    def mixed(self, chunks: Sequence[tuple[int, int]], sequences: int, held: float) -> float:
        """Prompt chunks as (first position, tokens), and `sequences` that decode beside them."""
        tokens = sum(n for _, n in chunks) + sequences
        pairs = sum(n * (first + n / 2) for first, n in chunks)
        seconds = self.prompts.seconds(tokens) + self.position * pairs
        if sequences:
            decode = self.decode.total(sequences, held)
            seconds = max(decode, seconds + decode - self.decode.fixed)
        return seconds + self.step_overhead

    def plain(self, sequences: int, held: float, steps: int = 1) -> float:
        """`steps` steps of the same sequences, which only decode."""
        return self.decode.total(sequences, held, steps) + steps * self.step_overhead


@dataclass(frozen=True, kw_only=True)
class FittedTimes:
    """Step times, how far they are off, and what was measured."""

    times: StepTimes
    table: StepTable
    decode_errors: tuple[float, ...]  # relative, of each step predicted from the others
    prefill_errors: tuple[float, ...]  # the same of each prompt call; empty where there are too few to leave one out

    def lines(self) -> list[str]:
        """What the simulator stands on, for people."""
        t, d = self.times, self.times.decode
        prompt = _off(self.prefill_errors) if self.prefill_errors else "not known: too few were measured"
        calls = ", ".join(f"{tokens:.0f}: {1e3 * seconds:.3g}" for tokens, seconds in t.prompts.known if tokens)
        return [
            f"from {len(self.table.rows)} measured cases: {self.table.named}",
            f"decode step = {1e3 * d.fixed:.3g} ms + {1e6 * d.sequence:.3g} us/sequence + {1e9 * d.token:.3g} ns/token "
            f"held; off by {_off(self.decode_errors)}",
            f"prompt call = ms by tokens ({calls}, {1e6 * t.prompts.slope:.3g} us/token beyond) "
            f"+ {1e12 * t.position:.3g} ps/token/position; off by {prompt}",
        ]

    def gaps(self, *, sequences: int, context: int, prompt: int) -> list[str]:
        """What a load reaches that the table does not hold: the most sequences at once, tokens held, prompt tokens."""
        rows = self.table.rows
        out = []
        for what, reached, seen in (
            ("sequences at once", sequences, [r.batch for r in rows]),
            ("tokens held by a sequence", context, [r.context + r.new_tokens for r in rows]),
            ("tokens of a prompt", prompt, [r.context for r in rows]),
        ):
            if reached > max(seen):
                out.append(f"{reached} {what}: beyond the table's largest, {max(seen)}: extrapolated")
        if not self.table.prompt_calls:
            out.append("no prompt calls as serving makes them, in an older bench: short calls take less than predicted")
        return out


def fit_times(
    table: StepTable, config: JetNemotronConfig, dtypes: Dtypes, step_overhead: float = 0.0, scale: float = 1.0
) -> FittedTimes:
    """Step times of the model whose steps the table holds. `scale`: all of them times so much, for another device.

    Raises JetExportError where the table has too few steps for a fit."""
    if not table.enough:
        raise JetExportError(
            f"simulate: {table.named} has too few decode steps (at least 4, of at least 3 batches).",
            "jet-export bench BUNDLE --contexts 1k,16k --batch 1,8,64 --output DIR makes a table.",
        )
    points = [(float(r.moved), r.batch, r.step_seconds) for r in table.rows]
    several = [p for p in points if p[1] > 1]
    if len(several) < MIN_ROWS:
        several = points
    fit = fit_steps(several)
    alone = fit_alone(points, fit.byte) if several is not points else None
    specs, weights = dtypes.specs(config), table.rows[0].step_bytes["weights"]

    def bytes_of(context: int) -> int:
        """Of one sequence, without the weights."""
        return spaced_bytes(step_bytes(config, specs, 0, 1, context), specs, 1, dtypes.state_interval).total

    size = config.window_size if any(s.rows == "window_pages" for s in specs) else 0
    full = (bytes_of(size + 65536) - bytes_of(size)) / 65536
    window = (bytes_of(size) - bytes_of(0)) / size - full if size else 0.0
    states = fit.byte * bytes_of(0)
    prompts, position, errors = prompt_times(table, fit.byte * weights, scale)
    times = StepTimes(
        decode=DecodeTimes(
            fixed=scale * (fit.overhead + fit.byte * weights),
            fixed_alone=scale * ((alone.overhead if alone else fit.overhead) + fit.byte * weights),
            sequence=scale * (states + fit.each),
            sequence_alone=scale * (states + (0.0 if alone else fit.each)),
            token=scale * fit.byte * full,
            window=Window(token=scale * fit.byte * window, size=size),
        ),
        prompts=prompts,
        position=position,
        byte=scale * fit.byte,
        step_overhead=step_overhead,
    )
    return FittedTimes(times=times, table=table, decode_errors=left_out_errors(several), prefill_errors=errors)


def prompt_times(table: StepTable, least: float, scale: float) -> tuple[PromptTimes, float, tuple[float, ...]]:
    """Of prompt calls: their times, seconds that each token before a token adds, and the errors of those left out.
    `least`: seconds of a call of no tokens at least, where it has to be told from prefill speeds."""
    prefill = [(tokens, round(pairs), seconds) for seconds, tokens, pairs in map(prefill_call, table.rows)]
    calls = fit_steps(prefill)
    position = scale * calls.each
    if table.prompt_calls:
        seen: dict[int, list[float]] = {}
        for c in table.prompt_calls:
            seen.setdefault(c.tokens, []).append(c.ms)
        times = {n: scale * statistics.median(ms) / 1e3 - position * n * n / 2 for n, ms in sorted(seen.items())}
        prompts = PromptTimes(known=tuple((float(n), max(0.0, s)) for n, s in times.items()))
        return prompts, position, prompts.left_out_errors()
    prompts = PromptTimes.affine(scale * max(calls.overhead, least), scale * calls.byte)
    return prompts, position, left_out_errors(prefill) if len(prefill) > 3 else ()


def prefill_call(r: Row) -> tuple[float, float, float]:
    """The mean call of a row's fill: seconds, tokens, and the positions of its tokens added up."""
    case = Case(batch=r.batch, context=r.context, chunk=r.chunk, new_tokens=r.new_tokens)
    calls, tokens = case.prefill_calls, r.batch * r.context
    return tokens / r.prefill_tokens_per_s / calls, tokens / calls, tokens * r.context / 2 / calls


def _off(errors: Sequence[float]) -> str:
    return f"{statistics.median(errors):.1%} (median), {max(errors):.1%} (worst)"
