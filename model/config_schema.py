"""The schema of config.json: what each key that is read here may hold, by model_type.

A key that is absent or null has the default that stands here; one without a default must be there. Other keys are
config_keys.py's: refused, known to change nothing, or a warning. Sources: NVlabs/Jet-Nemotron
`configuration_jet_nemotron.py`; transformers' Qwen2Config, Qwen3Config and Qwen3_5TextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from jet_export.utils.errors import JetExportError
from jet_export.utils.schema import Called, Count, parse

NO_TOKEN = -1  # null: the model has no such token


def whole(value: Any) -> Any:
    """64.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: Any) -> Any:
    """A number may be written as a string, as the published norm_eps is."""
    try:
        return float(value) if isinstance(value, str | int) and not isinstance(value, bool) else value
    except (ValueError, OverflowError):
        return value


def token(value: Any) -> Any:
    """The first of a list is read."""
    if isinstance(value, list):
        value = value[0] if value else None
    return NO_TOKEN if value is None else value


Whole = Annotated[Count, BeforeValidator(whole)]
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Token = Annotated[int, BeforeValidator(token), Called("a token id, a list of them, or null")]


@dataclass(frozen=True, kw_only=True)
class RopeKeys:
    """`rope_parameters` and `rope_scaling`."""

    rope_theta: Number | None = None
    rope_type: str = "default"
    type: str = "default"
    partial_rotary_factor: Number | None = None


@dataclass(frozen=True, kw_only=True)
class CommonKeys:
    """Of every family."""

    model_type: str
    hidden_size: Whole
    intermediate_size: Whole
    num_attention_heads: Whole
    num_key_value_heads: Whole | None = None  # as many
    vocab_size: Whole
    max_position_embeddings: Whole
    rope_theta: Number | None = None
    rope_parameters: RopeKeys = RopeKeys()  # of transformers 5
    rope_scaling: RopeKeys = RopeKeys()
    rms_norm_eps: Number = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: Token = NO_TOKEN
    eos_token_id: Token = NO_TOKEN
    initializer_range: Number = 0.02  # read from `raw`, for random weights
    quantization_config: dict[str, Any] = field(default_factory=dict)  # fp8_checkpoint.py and fp8_blocks.py read it
    layer_types: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LayerKeys:
    """`efficient_attention_config.jet.layers.N`."""

    head_dim: Whole
    expand_v: Number
    num_heads: Whole


@dataclass(frozen=True, kw_only=True)
class JetKeys:
    """`efficient_attention_config.jet`."""

    num_heads: Whole = 1
    head_dim: Whole = 32
    expand_v: Number = 2.0
    conv_size: Whole = 4
    dconv_generator_reduction: Whole = 8
    norm_eps: Number = 1e-5
    layers: dict[str, LayerKeys] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SwaKeys:
    """`efficient_attention_config.swa`."""

    window_size: Whole = 0


@dataclass(frozen=True, kw_only=True)
class MixerKeys:
    """`efficient_attention_config`."""

    jet: JetKeys | None = None
    swa: SwaKeys = SwaKeys()


@dataclass(frozen=True, kw_only=True)
class JetNemotronKeys(CommonKeys):
    num_hidden_layers: Whole | None = None  # as many as layer_types
    head_dim: Whole | None = None
    qk_norm: bool = False
    qkv_bias: bool = True
    efficient_attention_config: MixerKeys = MixerKeys()


@dataclass(frozen=True, kw_only=True)
class QwenKeys(CommonKeys):
    """Qwen2(.5) and Qwen3."""

    num_hidden_layers: Whole
    head_dim: Whole | None = None


@dataclass(frozen=True, kw_only=True)
class Qwen35Keys(CommonKeys):
    """The text model of Qwen3.5, with transformers' defaults."""

    num_hidden_layers: Whole
    head_dim: Whole = 256
    full_attention_interval: Whole = 4
    linear_num_value_heads: Whole = 32
    linear_num_key_heads: Whole = 16
    linear_key_head_dim: Whole = 128
    linear_value_head_dim: Whole = 128
    linear_conv_kernel_dim: Whole = 4
    partial_rotary_factor: Number | None = None  # 0.25; in rope_parameters, too


Keys = TypeVar("Keys", bound=CommonKeys)


def read_keys(cls: type[Keys], values: Mapping[str, Any], where: str) -> Keys:
    """Raises JetExportError: the file, the key, its value, and what it takes."""
    try:
        given = without_nulls(values)
    except RecursionError:
        raise JetExportError(f"{where}: nested too deeply.") from None
    return parse(cls, given, where, table="object", closed=False)


def without_nulls(values: Any) -> Any:
    """Objects without the keys that are null, at any depth; the nulls of a list stay."""
    if isinstance(values, Mapping):
        return {key: without_nulls(value) for key, value in values.items() if value is not None}
    return values
