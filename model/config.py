"""JetNemotronConfig: the published config.json, read, checked and written.

Source: NVlabs/Jet-Nemotron `configuration_jet_nemotron.py` and the config.json of jet-ai/Jet-Nemotron-2B and -4B;
transformers' Qwen2Config, Qwen3Config and Qwen3_5TextConfig.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jet_export.model.config_keys import unknown_keys
from jet_export.model.config_read import config_fields
from jet_export.model.config_schema import NO_TOKEN
from jet_export.model.jet_dims import JetDims as JetDims
from jet_export.model.jet_dims import expand_v_of as expand_v_of
from jet_export.model.qwen3_5 import TEXT, published, text_part
from jet_export.utils.errors import JetExportError, JetExportWarning, shown
from jet_export.utils.schema import read_json

LAYER_TYPES = ("jet", "attn", "swa")
CONVOLUTIONS = ("dynamic", "static")
ARCHITECTURES = {"jet_nemotron": "JetNemotron", "qwen2": "Qwen2", "qwen3": "Qwen3", TEXT: "Qwen3_5"}
MAX_HEAD_K_DIM, MAX_HEAD_V_DIM, MAX_HEAD_DIM = 256, 576, 256
MAX_LAYERS, MAX_HEADS, MAX_POSITIONS = 1024, 1024, 2**24
MAX_SIZES = {"hidden_size": 2**16, "intermediate_size": 2**20, "vocab_size": 2**22}  # several times any model's


@dataclass(frozen=True)
class JetNemotronConfig:
    """Sizes of a Jet-Nemotron model, of a Qwen2 or Qwen3, whose layers are all `attn`, or of a Qwen3.5.

    `layer_types` names each layer's mixer: `jet` (a gated delta rule: JetBlock, or Gated DeltaNet), `attn` (full
    attention) or `swa` (sliding window). `jet_num_heads`, `head_k_dim` (K) and `head_v_dim` (V) describe the
    JetBlocks, except those that `jet_layers` gives other sizes; `num_attention_heads`, `num_key_value_heads` and
    `head_dim` describe the attention layers. `raw` keeps all fields that were read from config.json, so that
    writing preserves those that are not used here.
    """

    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    jet_num_heads: int
    head_k_dim: int
    expand_v: float
    conv_size: int = 4
    dconv_generator_reduction: int = 8
    jet_norm_eps: float = 1e-5
    window_size: int = 0  # of the swa layers; 0 where there are none
    jet_layers: tuple[tuple[int, JetDims], ...] = ()  # (layer, its own sizes), by layer; not in published checkpoints
    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    bos_token_id: int = 151643  # NO_TOKEN (-1): config.json has null
    eos_token_id: int = 151643
    qk_norm: bool = False  # RMSNorm of each attention head's query and key, before RoPE (Qwen3); published: none
    qkv_bias: bool = True  # of the attention layers (Qwen2 and the published models; Qwen3 has none)
    rotary_dim: int = 0  # columns of an attention head that are rotated; 0: all
    output_gate: bool = False  # attention's output is multiplied by the sigmoid of a gate (Qwen3.5)
    jet_conv: str = "dynamic"  # on the values, a kernel a token (JetBlock); static: on q, k and the values, one kernel
    jet_num_key_heads: int = 0  # heads of q and k, each shared by jet_num_heads / jet_num_key_heads; 0: as many
    norm_offset: bool = False  # RMSNorm multiplies by 1 + weight (Qwen3.5), the jet layers' own norm excepted
    model_type: str = "jet_nemotron"  # or qwen2, qwen3, qwen3_5_text: config.json's; the fields above say all else
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_v_dim(self) -> int:
        return int(self.head_k_dim * self.expand_v)

    @property
    def jet_value_dim(self) -> int:
        """D = H * V, the width of a JetBlock's values."""
        return self.jet_num_heads * self.head_v_dim

    @property
    def key_heads(self) -> int:
        """Heads of q and k of a jet layer."""
        return self.jet_num_key_heads or self.jet_num_heads

    @property
    def rope_dim(self) -> int:
        """Columns of an attention head that are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def generator_dim(self) -> int:
        """R, the hidden width of the dynamic convolution's kernel generator."""
        return self.generator_dim_of(self.jet_value_dim)

    def generator_dim_of(self, value_dim: int) -> int:
        """R of a jet layer of this D; 0 where the convolution is static."""
        return value_dim // self.dconv_generator_reduction if self.jet_conv == "dynamic" else 0

    def key_dim(self, dims: JetDims) -> int:
        """HK * K, the width of a jet layer's queries, and of its keys."""
        return (self.jet_num_key_heads or dims.num_heads) * dims.head_k_dim

    def conv_dim(self, dims: JetDims) -> int:
        """C, the channels of a jet layer's convolution: of its values, or of q, k and the values."""
        return dims.value_dim + (2 * self.key_dim(dims) if self.jet_conv == "static" else 0)

    def jet_dims(self, layer: int) -> JetDims:
        """The sizes of this layer's JetBlock."""
        shared = JetDims(self.jet_num_heads, self.head_k_dim, self.head_v_dim)
        return dict(self.jet_layers).get(layer, shared)

    def with_jet_dims(self, dims: Mapping[int, JetDims]) -> JetNemotronConfig:
        """This architecture with these JetBlock sizes by layer; the most common become the shared configuration."""
        if not dims:
            return replace(self, jet_layers=())
        shared = Counter(dims.values()).most_common(1)[0][0]
        return replace(
            self,
            jet_num_heads=shared.num_heads,
            head_k_dim=shared.head_k_dim,
            expand_v=expand_v_of(shared),
            jet_layers=tuple(sorted((i, JetDims(*d)) for i, d in dims.items() if d != shared)),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> JetNemotronConfig:
        """Read the published layout. Raises JetExportError naming the key that is missing, wrong or unsupported."""
        try:
            return cls(**config_fields(values, where))
        except JetExportError as e:
            text = str(e)
            own = text.startswith("config: ")  # check_config's
            raise JetExportError(f"{where}: {text.removeprefix('config: ')}" if own else text) from None

    @classmethod
    def from_json_file(cls, path: str | Path) -> JetNemotronConfig:
        path = Path(path)
        values = read_json(path)
        if not isinstance(values, dict):
            raise JetExportError(f"{path}: not a JSON object.")
        config = cls.from_dict(values, where=str(path))
        if unknown := unknown_keys(text_part(values, str(path))):
            names = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
            text = f"{path}: not known here, and ignored: {names}. Logits are wrong if the model depends on it."
            warnings.warn(text, JetExportWarning, stacklevel=2)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The published layout: what `from_dict`, and the published code, read."""
        return {**self._published_defaults(), **self._raw(), **self._sizes(), **self._mixers()}

    def _raw(self) -> dict[str, Any]:
        """What was read, less the other spelling of rope_theta, and what names files that are not written."""
        return {k: v for k, v in self.raw.items() if k not in ("rope_parameters", "auto_map")}

    def _mixers(self) -> dict[str, Any]:
        """Which mixer each layer has, and its sizes."""
        if self.model_type == TEXT:
            return published(self)
        if self.model_type != "jet_nemotron":
            return {"layer_types": ["full_attention"] * self.num_hidden_layers} if "layer_types" in self.raw else {}
        jet_raw = (self.raw.get("efficient_attention_config") or {}).get("jet") or {}
        mixers: dict[str, Any] = {
            "jet": {
                "mode": "chunk",
                "dconv_implementation": "triton",
                **jet_raw,
                "conv_size": self.conv_size,
                "dconv_generator_reduction": self.dconv_generator_reduction,
                "expand_v": self.expand_v,
                "head_dim": self.head_k_dim,
                "num_heads": self.jet_num_heads,
                "norm_eps": jet_raw.get("norm_eps", f"{self.jet_norm_eps:g}".replace("e-05", "e-5")),
            }
        }
        mixers["jet"].pop("layers", None)
        if self.jet_layers:
            mixers["jet"]["layers"] = {
                str(i): {"head_dim": d.head_k_dim, "expand_v": expand_v_of(d), "num_heads": d.num_heads}
                for i, d in self.jet_layers
            }
        if self.window_size:
            mixers["swa"] = {"window_size": self.window_size}
        return {
            "layer_types": list(self.layer_types),
            "efficient_attention_config": mixers,
            **({"qk_norm": self.qk_norm} if self.qk_norm or "qk_norm" in self.raw else {}),
            **({"qkv_bias": self.qkv_bias} if not self.qkv_bias or "qkv_bias" in self.raw else {}),
        }

    def _published_defaults(self) -> dict[str, Any]:
        """What published files have and nothing here depends on."""
        return {
            "architectures": [f"{ARCHITECTURES[self.model_type]}ForCausalLM"],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rope_scaling": None,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            **({} if self.model_type == TEXT else {"max_window_layers": self.num_hidden_layers}),
            **({"use_mrope": False} if self.model_type == "jet_nemotron" else {}),
        }

    def _sizes(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": None if self.bos_token_id == NO_TOKEN else self.bos_token_id,
            "eos_token_id": None if self.eos_token_id == NO_TOKEN else self.eos_token_id,
        }

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def check_config(c: JetNemotronConfig) -> None:
    """Refuse sizes that the kernels do not support. Raises JetExportError naming the field and the valid values."""
    if len(c.layer_types) > MAX_LAYERS:
        raise JetExportError(f"config: num_hidden_layers is {len(c.layer_types)}, more than {MAX_LAYERS}.")
    for i, kind in enumerate(c.layer_types):
        if kind not in LAYER_TYPES:
            raise JetExportError(f"config: layer_types[{i}] is {shown(kind)}.", f"Known: {', '.join(LAYER_TYPES)}.")
    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "jet_num_heads"), MAX_HEADS)
    sizes |= {**MAX_SIZES, "max_position_embeddings": MAX_POSITIONS, "dconv_generator_reduction": 2**20}
    for name, limit in sizes.items():
        check_range(name, getattr(c, name), 1, limit)
    if c.num_attention_heads % c.num_key_value_heads:
        raise JetExportError(
            f"config: num_attention_heads {c.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {c.num_key_value_heads}."
        )
    if c.jet_conv not in CONVOLUTIONS:
        raise JetExportError(f"config: jet_conv is {shown(c.jet_conv)}.", f"Known: {', '.join(CONVOLUTIONS)}.")
    if c.jet_num_key_heads < 0 or c.jet_num_heads % c.key_heads or (c.jet_num_key_heads and c.jet_conv == "dynamic"):
        raise JetExportError(
            f"config: {c.jet_num_key_heads} key heads beside {c.jet_num_heads} value heads, convolution {c.jet_conv}.",
            "Value heads are a multiple of key heads, which only a static convolution may have fewer of.",
        )
    if not 0 < c.rope_dim <= c.head_dim or c.rope_dim % 2:
        raise JetExportError(f"config: rotary_dim is {c.rope_dim}, which is no even part of head_dim {c.head_dim}.")
    if not 2 <= c.conv_size <= 8:
        raise JetExportError(f"config: conv_size {c.conv_size} is not between 2 and 8.")
    check_range("window_size of the swa layers", c.window_size, 1 if "swa" in c.layer_types else 0, MAX_POSITIONS)
    check_range("rope_theta", c.rope_theta, 1.0, 1e12)
    check_range("expand_v of the jet layers", c.expand_v, 0.0, MAX_HEAD_V_DIM)
    for name, eps in (("rms_norm_eps", c.rms_norm_eps), ("norm_eps of the jet layers", c.jet_norm_eps)):
        check_range(name, eps, 1e-12, 1e-1)
    for name in ("bos_token_id", "eos_token_id"):
        check_range(name, getattr(c, name), NO_TOKEN, c.vocab_size - 1, f"The vocabulary has {c.vocab_size} tokens.")
    for i, d in c.jet_layers:
        if c.layer_types[i : i + 1] != ("jet",):
            raise JetExportError(
                f"config: efficient_attention_config.jet.layers names layer {i}, which is no jet layer."
            )
        check_range(f"num_heads of jet layer {i}", d.num_heads, 1, MAX_HEADS)
    for name, value, limit in (
        ("head_dim of the attention layers", c.head_dim, MAX_HEAD_DIM),
        ("head_k_dim of the jet layers", c.head_k_dim, MAX_HEAD_K_DIM),
        ("head_v_dim of the jet layers", c.head_v_dim, MAX_HEAD_V_DIM),
        *((f"head_k_dim of jet layer {i}", d.head_k_dim, MAX_HEAD_K_DIM) for i, d in c.jet_layers),
        *((f"head_v_dim of jet layer {i}", d.head_v_dim, MAX_HEAD_V_DIM) for i, d in c.jet_layers),
    ):
        if value <= 0 or value % 16 or value > limit:
            raise JetExportError(f"config: {name} is {value}.", f"The kernels take multiples of 16 up to {limit}.")
    least = c.dconv_generator_reduction if c.jet_conv == "dynamic" else 1
    for i in (i for i, kind in enumerate(c.layer_types) if kind == "jet"):
        check_range(f"num_heads * head_v_dim of jet layer {i}", c.jet_dims(i).value_dim, least, 2**20)


def check_range(name: str, value: float, low: float, high: float, todo: str = "") -> None:
    """Raise JetExportError unless low <= value <= high, which NaN is not."""
    if not low <= value <= high:
        raise JetExportError(f"config: {name} is {value:,}, not between {low:,} and {high:,}.", todo)
