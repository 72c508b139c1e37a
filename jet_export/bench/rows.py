"""Measured cases of a bundle as rows: speeds, and what share of the roofline they reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from jet_export.backends.base import Engine
from jet_export.bench.measure import Case, Measurement, measure_engine
from jet_export.bench.protocols import Room, throughput_only
from jet_export.bench.roofline import Roofline
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case. Times in milliseconds, memory in bytes; speeds are of all sequences together."""

    bundle: str
    model: str
    precision: str
    context: int
    batch: int
    chunk: int
    new_tokens: int
    filled_by: str  # "prefill", or "synthetic" states
    throughput_only: bool  # the context is beyond the model's positions
    prefill_tokens_per_s: float
    prefill_of_roofline: float
    decode_tokens_per_s: float  # by the mean of all timed steps
    ms_per_token: float  # median step
    ms_per_token_p90: float
    decode_of_roofline: float  # of one that writes recurrent states at every token
    ttft_p50: float | None
    ttft_p99: float | None
    ttft_samples: int
    step_bytes: dict[str, int]  # of decode_of_roofline
    state_bytes: int
    memory_predicted: int  # bundle/memory.py's estimate, weights and workspace included
    memory_peak: int | None  # measured, of the process; on a GPU only
    state_interval: int = 1  # recurrent states are written every so many tokens
    decode_of_interval_roofline: float | None = None  # of one that writes them so; None where that is every token
    interval_step_bytes: dict[str, int] | None = None  # of decode_of_interval_roofline, the average of an interval

    @property
    def moved(self) -> int:
        """The least bytes of a step of this bundle."""
        return (self.interval_step_bytes or self.step_bytes)["total"]

    @property
    def of_own_roofline(self) -> float:
        """The share of what decode's roofline allows a bundle with this one's interval."""
        share = self.decode_of_interval_roofline
        return self.decode_of_roofline if share is None else share

    @property
    def step_seconds(self) -> float:
        """The mean step."""
        return self.batch / self.decode_tokens_per_s


def precision_of(manifest: Manifest) -> str:
    """`precision_name` of a bundle."""
    return precision_name(manifest.dtypes, fp8=bool(manifest.fp8_layers))


def precision_name(dtypes: Dtypes, *, fp8: bool) -> str:
    """ "fp8", "fp8+fast", "bf16+fp8 kv", "fp8+state/8", ...: the weights, fast accumulation of their products, a KV
    cache not in the model dtype, a state not in fp32, and the tokens between two writes of one not written at each."""
    short = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}
    out = "fp8" if fp8 else short[dtypes.model]
    if dtypes.fast_accumulation:
        out += "+fast"
    if dtypes.kv_cache != dtypes.model:
        out += f"+{short[dtypes.kv_cache]} kv"
    if dtypes.state != torch.float32:
        out += f"+{short[dtypes.state]} state"
    if dtypes.state_interval > 1:
        out += f"+state/{dtypes.state_interval}"
    return out


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded bundle, and what its figures are compared with."""

    bundle: Path
    engine: Engine
    room: Room
    roofline: Roofline

    def measure(self, case: Case, fill_seconds: float, emit: Callable[[str], None]) -> Row:
        """Time a case; `emit` gets a line about it."""
        (m,) = measure_engine(self.engine, [case], fill_seconds=fill_seconds)
        r = self.row(m)
        emit(
            f"  {r.model} {r.precision}, context {r.context}, batch {r.batch}: prefill {r.prefill_tokens_per_s:,.0f} "
            f"tokens/s, decode {r.decode_tokens_per_s:,.0f} tokens/s, {1e3 * r.step_seconds:.3g} ms a step"
        )
        return r

    def row(self, m: Measurement) -> Row:
        case, manifest, roofline = m.case, self.room.manifest, self.roofline
        held = case.context + case.new_tokens / 2  # on average, while decoding
        every, interval = roofline.step_bytes(case.batch, held), manifest.state_interval
        spaced = roofline.step_bytes(case.batch, held, interval) if interval > 1 else None
        of_copy = m.decode_tokens_per_s / case.batch / roofline.peaks.copy  # share that a byte a step is
        return Row(
            bundle=str(self.bundle),
            model=manifest.model["name"],
            precision=precision_of(manifest),
            context=case.context,
            batch=case.batch,
            chunk=case.chunk,
            new_tokens=case.new_tokens,
            filled_by=m.filled_by,
            throughput_only=throughput_only(manifest, case.tokens),
            prefill_tokens_per_s=m.prefill_tokens_per_s,
            prefill_of_roofline=m.prefill_tokens_per_s * roofline.prefill_seconds(case) / (case.batch * case.context),
            decode_tokens_per_s=m.decode_tokens_per_s,
            ms_per_token=m.step.median,
            ms_per_token_p90=m.step.p90,
            decode_of_roofline=every.total * of_copy,
            ttft_p50=m.ttft_p50,
            ttft_p99=m.ttft_p99,
            ttft_samples=len(m.ttft),
            step_bytes={**asdict(every), "total": every.total},
            state_bytes=m.state_bytes,
            memory_predicted=self.room.needed(case),
            memory_peak=m.peak_bytes,
            state_interval=interval,
            decode_of_interval_roofline=spaced.total * of_copy if spaced else None,
            interval_step_bytes={**asdict(spaced), "total": spaced.total} if spaced else None,
        )
