"""The tables of a space file: its schema. What depends on the model is checked by `space.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from jet_export.utils.schema import NonNegative, OneOrMany, one_of, one_or_many

MAX_INT = 2**31 - 1
Number = Annotated[int, Field(ge=1, le=MAX_INT)]
Numbers = Annotated[tuple[Number, ...], OneOrMany, Field(min_length=1)]
Words = Annotated[tuple[str, ...], OneOrMany, Field(min_length=1)]
Axis = Annotated[tuple[Annotated[int, Field(ge=1, le=999_999)], ...], OneOrMany, Field(min_length=1)]
StateDtype = Annotated[str, one_of("float32", "bfloat16")]
CacheDtype = Annotated[str, one_of("auto", "fp8")]


def preset_or_many(value: Any) -> Any:
    """Validator of a field whose None is written "preset"."""
    return None if value == "preset" else one_or_many(value)


@dataclass(frozen=True, kw_only=True)
class JetTable:
    sizes: Words = ()
    head_k_dim: Axis = ()
    head_v_dim: Axis = ()
    num_heads: Axis = ()
    num_key_heads: Axis = ()  # of Gated DeltaNets
    share: Any = "all"  # or "each", or groups of layers


@dataclass(frozen=True, kw_only=True)
class PrecisionTable:
    fp8: Annotated[tuple[bool, ...], OneOrMany, Field(min_length=1)] = (False,)
    state_dtype: Annotated[tuple[StateDtype, ...], OneOrMany, Field(min_length=1)] = ("float32",)
    kv_cache_dtype: Annotated[tuple[CacheDtype, ...], OneOrMany, Field(min_length=1)] = ("auto",)


@dataclass(frozen=True, kw_only=True)
class AttentionTable:
    window_size: Annotated[
        Annotated[tuple[Number, ...], Field(min_length=1)] | None, BeforeValidator(preset_or_many)
    ] = None
    layout: Any = "preset"  # or letters, a list of them, or counts of attn and swa layers


@dataclass(frozen=True, kw_only=True)
class ConstraintsTable:
    cache_bytes: Any = None  # bytes, "preset" or "none"
    gpu_memory: Any = None  # bytes, "device" or "none"
    parameters: Any = field(default_factory=lambda: [0, math.inf])
    decode_ms: NonNegative | None = None
    tokens_per_s: NonNegative | None = None
    prefill_tokens_per_s: NonNegative | None = None


@dataclass(frozen=True, kw_only=True)
class MeasureTable:
    batch: Numbers = (1,)
    context: Numbers = ()  # default: 4096, or what the model was trained for
    prefill_chunk: Number = 2048
    new_tokens: Annotated[int, Field(ge=2, le=MAX_INT)] = 64  # one step is dropped
    layers: Number = 2
    repeats: Number = 3
    fill: Annotated[str, one_of("auto", "prefill", "synthetic")] = "auto"


@dataclass(frozen=True, kw_only=True)
class TargetTable:
    batch: Number | None = None  # default: the largest that is measured
    context: Number | None = None
    slack_percent: NonNegative = 3.0


@dataclass(frozen=True, kw_only=True)
class SpaceFile:
    jet: JetTable = JetTable()
    precision: PrecisionTable = PrecisionTable()
    attention: AttentionTable = AttentionTable()
    constraints: ConstraintsTable = ConstraintsTable()
    measure: MeasureTable = MeasureTable()
    target: TargetTable = TargetTable()
