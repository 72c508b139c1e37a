"""One bundle's measured cases as rows: speeds beside what the roofline allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jet_export.backends.base import Engine
from jet_export.bench.measure import Case, Measurement, measure_engine
from jet_export.bench.protocols import Room, throughput_only
from jet_export.bench.roofline import Peaks, Weights, decode_seconds, prefill_seconds, step_bytes
from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.limits import MAX_PREFILL_TOKENS
from jet_export.bundle.manifest import Manifest


@dataclass(frozen=True)
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
    decode_tokens_per_s: float
    ms_per_token: float  # median step
    ms_per_token_p90: float
    decode_of_roofline: float
    ttft_p50: float | None
    ttft_p99: float | None
    ttft_samples: int
    step_bytes: dict[str, int]
    state_bytes: int
    memory_predicted: int  # by memory.py, weights and workspace included
    memory_peak: int | None  # measured, of the process; on a GPU only


def precision_of(manifest: Manifest) -> str:
    """As `precision_name`, of a bundle."""
    quantised = bool((manifest.quantization or {}).get("fp8"))
    return precision_name(quantised, manifest.dtype, manifest.kv_cache_dtype, manifest.state_dtype)


def precision_name(fp8: bool, dtype: str, kv_cache_dtype: str, state_dtype: str) -> str:
    """ "fp8", "bf16+fp8 kv", ... of weights, then what differs from the usual cache and state."""
    short = {"bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "fp8"}
    out = "fp8" if fp8 else short.get(dtype, dtype)
    if kv_cache_dtype != dtype:
        out += f"+{short[kv_cache_dtype]} kv"
    if state_dtype != "float32":
        out += f"+{short[state_dtype]} state"
    return out


def measure_rows(
    engine: Engine,
    room: Room,
    weights: Weights,
    peaks: Peaks,
    cases: Sequence[Case],
    bundle: Path,
    fill_seconds: float,
    emit: Callable[[str], None],
) -> list[Row]:
    """Time the cases one after the other; `emit` gets a line for each."""
    rows = []
    for case in cases:
        (m,) = measure_engine(engine, [case], fill_seconds=fill_seconds)
        rows.append(row_of(m, engine, room, weights, peaks, bundle))
        r = rows[-1]
        emit(
            f"  {r.model} {r.precision}, context {r.context}, batch {r.batch}: prefill {r.prefill_tokens_per_s:,.0f} "
            f"tokens/s, decode {r.decode_tokens_per_s:,.0f} tokens/s, {r.ms_per_token:.3g} ms a step"
        )
    return rows


def row_of(m: Measurement, engine: Engine, room: Room, weights: Weights, peaks: Peaks, bundle: Path) -> Row:
    case, manifest = m.case, room.manifest
    held = case.context + case.new_tokens / 2  # on average, while decoding
    moved = step_bytes(engine.config, engine.specs, weights.read, case.batch, held)
    groups = -(-case.batch // max(1, MAX_PREFILL_TOKENS // case.chunk))
    calls = groups * -(-case.context // case.chunk)
    fill = prefill_seconds(
        engine.config, engine.specs, weights, peaks, torch_dtype(manifest.dtype),
        case.batch, case.context, case.chunk, calls,
    )  # fmt: skip
    return Row(
        bundle=str(bundle),
        model=manifest.model["name"],
        precision=precision_of(manifest),
        context=case.context,
        batch=case.batch,
        chunk=case.chunk,
        new_tokens=case.new_tokens,
        filled_by=m.filled_by,
        throughput_only=throughput_only(manifest, case.tokens),
        prefill_tokens_per_s=m.prefill_tokens_per_s,
        prefill_of_roofline=m.prefill_tokens_per_s * fill / (case.batch * case.context),
        decode_tokens_per_s=m.decode_tokens_per_s,
        ms_per_token=m.step.median,
        ms_per_token_p90=m.step.p90,
        decode_of_roofline=decode_seconds(moved, peaks) / (m.step.median * 1e-3),
        ttft_p50=m.ttft_p50,
        ttft_p99=m.ttft_p99,
        ttft_samples=len(m.ttft),
        step_bytes={**asdict(moved), "total": moved.total},
        state_bytes=m.state_bytes,
        memory_predicted=room.needed(case.batch, case.tokens, case.chunk),
        memory_peak=m.peak_bytes,
    )


def row_from_dict(values: dict[str, Any]) -> Row:
    return Row(**values)
