"""JetNemotronConfig: the published config.json, read, checked and written; and the presets' sizes.

Source: NVlabs/Jet-Nemotron `configuration_jet_nemotron.py` and the config.json of jet-ai/Jet-Nemotron-2B and -4B
(arXiv 2508.15884, table of architectures).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jet_export.utils.errors import JetExportError

LAYER_TYPES = ("jet", "attn", "swa")
MAX_HEAD_K_DIM, MAX_HEAD_V_DIM, MAX_HEAD_DIM = 256, 576, 128


class JetDims(NamedTuple):
    """Sizes of one JetBlock: H heads of K keys and V values."""

    num_heads: int
    head_k_dim: int
    head_v_dim: int

    @property
    def value_dim(self) -> int:
        """D = H * V, the width of its values."""
        return self.num_heads * self.head_v_dim

    def __str__(self) -> str:
        return f"{self.head_k_dim}x{self.head_v_dim}x{self.num_heads}"


@dataclass(frozen=True)
class JetNemotronConfig:
    """Sizes of a Jet-Nemotron model.

    `layer_types` names each layer's mixer: `jet` (JetBlock), `attn` (full attention) or `swa` (sliding window).
    `jet_num_heads`, `head_k_dim` (K) and `head_v_dim` (V) describe the JetBlocks, except those that `jet_layers` gives
    other sizes; `num_attention_heads`, `num_key_value_heads` and `head_dim` describe the attention layers. `raw` keeps
    all fields that were read from config.json, so that writing preserves those that are not used here.
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
    bos_token_id: int = 151643
    eos_token_id: int = 151643
    qk_norm: bool = False  # RMSNorm of each attention head's query and key, before RoPE (Qwen3); published: none
    qkv_bias: bool = True  # of the attention layers (Qwen2 and the published models; Qwen3 has none)
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
    def generator_dim(self) -> int:
        """R, the hidden width of the dynamic convolution's kernel generator."""
        return self.jet_value_dim // self.dconv_generator_reduction

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
        """Read the published layout. Raises JetExportError naming the field that is missing or wrong."""
        if values.get("model_type") != "jet_nemotron":
            raise JetExportError(
                f"{where}: model_type is {values.get('model_type')!r}, not 'jet_nemotron'.",
                "jet-export builds Jet-Nemotron checkpoints only.",
            )
        layers = tuple(values.get("layer_types") or ())
        mixers = values.get("efficient_attention_config") or {}
        jet, swa = mixers.get("jet") or {}, mixers.get("swa") or {}
        if not layers and values.get("num_hidden_layers") != 0:
            raise JetExportError(f"{where}: layer_types is empty.")
        if "jet" in layers and not jet:
            raise JetExportError(f"{where}: efficient_attention_config.jet is missing, which the jet layers need.")
        if "swa" in layers and not swa.get("window_size"):
            raise JetExportError(f"{where}: efficient_attention_config.swa.window_size is missing.")
        try:
            heads = int(values["num_attention_heads"])
            return cls(
                hidden_size=int(values["hidden_size"]),
                intermediate_size=int(values["intermediate_size"]),
                layer_types=layers,
                num_attention_heads=heads,
                num_key_value_heads=int(values.get("num_key_value_heads") or heads),
                head_dim=int(values.get("head_dim") or int(values["hidden_size"]) // heads),
                jet_num_heads=int(jet.get("num_heads", 1)),
                head_k_dim=int(jet.get("head_dim", 32)),
                expand_v=float(jet.get("expand_v", 2.0)),
                conv_size=int(jet.get("conv_size", 4)),
                dconv_generator_reduction=int(jet.get("dconv_generator_reduction", 8)),
                jet_norm_eps=float(jet.get("norm_eps", 1e-5)),
                window_size=int(swa.get("window_size", 0)),
                jet_layers=_jet_layers(jet.get("layers") or {}),
                vocab_size=int(values["vocab_size"]),
                max_position_embeddings=int(values["max_position_embeddings"]),
                rope_theta=_rope_theta(values, where),
                rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
                tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
                bos_token_id=_token_id(values.get("bos_token_id"), 0),
                eos_token_id=_token_id(values.get("eos_token_id"), 0),
                qk_norm=bool(values.get("qk_norm", False)),
                qkv_bias=bool(values.get("qkv_bias", True)),
                raw=dict(values),
            )
        except KeyError as e:
            raise JetExportError(f"{where}: field {e.args[0]!r} is missing.") from None
        except (TypeError, ValueError, AttributeError) as e:
            raise JetExportError(f"{where}: a field has a wrong type: {e}.") from None

    @classmethod
    def from_json_file(cls, path: str | Path) -> JetNemotronConfig:
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise JetExportError(f"{path}: no such file.") from None
        except OSError as e:
            raise JetExportError(f"{path}: cannot be read ({e.strerror}).") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise JetExportError(f"{path}: not valid JSON: {e}.") from None
        if not isinstance(values, dict):
            raise JetExportError(f"{path}: not a JSON object.")
        return cls.from_dict(values, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The published layout: what `from_dict`, and the published code, read."""
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
        published = {
            "architectures": ["JetNemotronForCausalLM"],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rope_scaling": None,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mrope": False,
            "max_window_layers": self.num_hidden_layers,
        }
        return {
            **published,
            **self.raw,
            "model_type": "jet_nemotron",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.layer_types),
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "efficient_attention_config": mixers,
            **({"qk_norm": self.qk_norm} if self.qk_norm or "qk_norm" in self.raw else {}),
            **({"qkv_bias": self.qkv_bias} if not self.qkv_bias or "qkv_bias" in self.raw else {}),
        }

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def expand_v_of(dims: JetDims) -> float:
    """The published form of V: the ratio for which int(head_dim * expand_v) is V, with ten digits if those suffice."""
    ratio = round(dims.head_v_dim / dims.head_k_dim, 10)
    while int(dims.head_k_dim * ratio) < dims.head_v_dim:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _jet_layers(layers: dict[str, dict[str, Any]]) -> tuple[tuple[int, JetDims], ...]:
    """`efficient_attention_config.jet.layers`: layer number -> head_dim, expand_v, num_heads."""
    return tuple(
        sorted(
            (int(i), JetDims(int(d["num_heads"]), int(d["head_dim"]), int(d["head_dim"] * float(d["expand_v"]))))
            for i, d in layers.items()
        )
    )


def _token_id(value: Any, default: int) -> int:
    """config.json may hold one id, a list of ids (the first is used) or null."""
    if isinstance(value, list):
        value = value[0] if value else None
    return default if value is None else int(value)


def _rope_theta(values: dict[str, Any], where: str) -> float:
    if values.get("rope_scaling"):
        raise JetExportError(f"{where}: rope_scaling {values['rope_scaling']!r} is not supported (published: null).")
    nested = values.get("rope_parameters") or {}
    return float(values.get("rope_theta") or nested.get("rope_theta") or 1e4)


def check_config(c: JetNemotronConfig) -> None:
    """Refuse sizes that the kernels do not support. Raises JetExportError naming the field and the valid values."""
    for i, kind in enumerate(c.layer_types):
        if kind not in LAYER_TYPES:
            raise JetExportError(f"config: layer_types[{i}] is {kind!r}.", f"Known: {', '.join(LAYER_TYPES)}.")
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in (*sizes, "jet_num_heads", "head_k_dim", "head_v_dim", "dconv_generator_reduction"):
        if getattr(c, name) <= 0:
            raise JetExportError(f"config: {name} is {getattr(c, name)}, not positive.")
    if c.num_attention_heads % c.num_key_value_heads:
        raise JetExportError(
            f"config: num_attention_heads {c.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {c.num_key_value_heads}."
        )
    if not 2 <= c.conv_size <= 8:
        raise JetExportError(f"config: conv_size {c.conv_size} is not between 2 and 8.")
    for i, d in c.jet_layers:
        if c.layer_types[i : i + 1] != ("jet",):
            raise JetExportError(
                f"config: efficient_attention_config.jet.layers names layer {i}, which is no jet layer."
            )
        if d.num_heads <= 0:
            raise JetExportError(f"config: num_heads of jet layer {i} is {d.num_heads}, not positive.")
    for name, value, limit in (
        ("head_dim of the attention layers", c.head_dim, MAX_HEAD_DIM),
        ("head_k_dim of the jet layers", c.head_k_dim, MAX_HEAD_K_DIM),
        ("head_v_dim of the jet layers", c.head_v_dim, MAX_HEAD_V_DIM),
        *((f"head_k_dim of jet layer {i}", d.head_k_dim, MAX_HEAD_K_DIM) for i, d in c.jet_layers),
        *((f"head_v_dim of jet layer {i}", d.head_v_dim, MAX_HEAD_V_DIM) for i, d in c.jet_layers),
    ):
        if value <= 0 or value % 16 or value > limit:
            raise JetExportError(f"config: {name} is {value}.", f"The kernels take multiples of 16 up to {limit}.")


def _layout(layers: int, attn: tuple[int, ...], swa: tuple[int, ...]) -> tuple[str, ...]:
    return tuple("attn" if i in attn else "swa" if i in swa else "jet" for i in range(layers))


def jet_2b() -> JetNemotronConfig:
    """jet-ai/Jet-Nemotron-2B; vocabulary, RoPE and tokens are the class's defaults."""
    return JetNemotronConfig(
        hidden_size=1536,
        intermediate_size=8960,
        layer_types=_layout(28, (14, 19), (20, 21)),
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        jet_num_heads=12,
        head_k_dim=96,
        expand_v=2.6666666667,
        window_size=1152,
        max_position_embeddings=131072,
    )


def jet_4b() -> JetNemotronConfig:
    """jet-ai/Jet-Nemotron-4B; vocabulary, RoPE and tokens are the class's defaults."""
    return JetNemotronConfig(
        hidden_size=2048,
        intermediate_size=11008,
        layer_types=_layout(36, (17, 20, 32), (5, 16, 19, 21, 22, 25, 27)),
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        jet_num_heads=16,
        head_k_dim=128,
        expand_v=2.0,
        window_size=2048,
        max_position_embeddings=32768,
    )


def qwen3_1_7b() -> JetNemotronConfig:
    """Sizes of Qwen/Qwen3-1.7B-Base, the paper's baseline: full attention alone. For comparisons of speed, with random
    weights: its own checkpoints are of another model type. The jet sizes are not used."""
    return JetNemotronConfig(
        hidden_size=2048,
        intermediate_size=6144,
        layer_types=("attn",) * 28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        qk_norm=True,
        qkv_bias=False,
        jet_num_heads=1,
        head_k_dim=32,
        expand_v=2.0,
        max_position_embeddings=32768,
    )
