"""Reads the published config.json of Jet-Nemotron, Qwen2(.5), Qwen3 and Qwen3.5 into JetNemotronConfig's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jet_export.model.config_fields import Fields
from jet_export.model.config_keys import MODEL_TYPES, check_keys
from jet_export.model.jet_dims import JetDims
from jet_export.model.qwen3_5 import TEXT, qwen3_5_fields, relative, text_part
from jet_export.utils.errors import JetExportError, shown

QWEN3_HEAD_DIM = 128  # of transformers' Qwen3Config, where config.json has none
MIXERS = "efficient_attention_config"


def config_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of JetNemotronConfig. Raises JetExportError naming a key that is missing, wrong or unsupported."""
    values = text_part(values, where)
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        what = relative(model_type)
        raise JetExportError(
            f"{where}: model_type is {model_type!r}" + (f": {what}." if what else ", not 'jet_nemotron'."),
            "jet-export builds Jet-Nemotron checkpoints, and dense Qwen2(.5), Qwen3 and Qwen3.5: "
            f"{', '.join(MODEL_TYPES)}.",
        )
    check_keys(values, where)
    f = Fields(values, where)
    own = _jet(f) if model_type == "jet_nemotron" else _qwen3_5(f) if model_type == TEXT else _qwen(f, model_type)
    return {**_common(f), **own, "raw": dict(values)}


def _common(f: Fields) -> dict[str, Any]:
    heads = f.integer("num_attention_heads")
    f.number("initializer_range", 0.02)  # read from `raw`, for random weights
    return {
        "model_type": f.values["model_type"],
        "hidden_size": f.integer("hidden_size"),
        "intermediate_size": f.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": f.integer("num_key_value_heads", heads),
        "vocab_size": f.integer("vocab_size"),
        "max_position_embeddings": f.integer("max_position_embeddings"),
        "rope_theta": _rope_theta(f),
        "rms_norm_eps": f.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": f.flag("tie_word_embeddings", False),
        "bos_token_id": f.token("bos_token_id"),
        "eos_token_id": f.token("eos_token_id"),
    }


def _rope_theta(f: Fields) -> float:
    """rope_theta, or transformers 5's rope_parameters.rope_theta, or their default; refused where two differ."""
    nested = f.object("rope_parameters")
    given = [g.number("rope_theta") for g in (f, nested) if g.values.get("rope_theta") is not None]
    if len(set(given)) > 1:
        raise JetExportError(f"{f.where}: rope_theta is {given[0]:g}, and {given[1]:g} in rope_parameters.")
    return given[0] if given else 1e4


def _head_dim(f: Fields, default: int | None = None) -> int:
    heads = max(f.integer("num_attention_heads"), 1)
    return f.integer("head_dim", default or f.integer("hidden_size") // heads)


def _check_count(f: Fields, layers: tuple[str, ...]) -> None:
    count = f.integer("num_hidden_layers", len(layers))
    if count != len(layers):
        raise JetExportError(
            f"{f.where}: num_hidden_layers is {count}, and layer_types names {len(layers)} layers.",
            "Make them agree: the tensors of a layer would not be read, or be missing.",
        )


def _jet(f: Fields) -> dict[str, Any]:
    layers = f.strings("layer_types")
    mixers = f.object(MIXERS)
    jet, swa = mixers.object("jet"), mixers.object("swa")
    if not layers and f.values.get("num_hidden_layers") != 0:
        raise JetExportError(f"{f.where}: layer_types is empty.")
    _check_count(f, layers)
    if "jet" in layers and not jet.values:
        raise JetExportError(f"{f.where}: {MIXERS}.jet is missing, which the jet layers need.")
    if "swa" in layers and not swa.values.get("window_size"):
        raise JetExportError(f"{f.where}: {MIXERS}.swa.window_size is missing.")
    return {
        "layer_types": layers,
        "head_dim": _head_dim(f),
        "qk_norm": f.flag("qk_norm", False),
        "qkv_bias": f.flag("qkv_bias", True),
        "jet_num_heads": jet.integer("num_heads", 1),
        "head_k_dim": jet.integer("head_dim", 32),
        "expand_v": jet.number("expand_v", 2.0),
        "conv_size": jet.integer("conv_size", 4),
        "dconv_generator_reduction": jet.integer("dconv_generator_reduction", 8),
        "jet_norm_eps": jet.number("norm_eps", 1e-5),
        "window_size": swa.integer("window_size", 0),
        "jet_layers": _jet_layers(jet.object("layers")),
    }


def _jet_layers(layers: Fields) -> tuple[tuple[int, JetDims], ...]:
    """`efficient_attention_config.jet.layers`: layer number -> head_dim, expand_v, num_heads."""
    out = []
    for i in layers.values:
        if not i.removeprefix("-").isdecimal() or len(i) > 9:
            raise JetExportError(f"{layers.where}: {layers.path}{i[:9]}: {shown(i)} is no layer number.")
        layer = layers.object(i)
        head_dim = layer.integer("head_dim")
        head_v_dim = min(head_dim * layer.number("expand_v"), 2.0**31)  # JetNemotronConfig names its limit
        out.append((int(i), JetDims(layer.integer("num_heads"), head_dim, int(max(head_v_dim, 0)))))
    return tuple(sorted(out))


def _qwen(f: Fields, model_type: str) -> dict[str, Any]:
    """Qwen2(.5) and Qwen3: full attention alone. Qwen2 has qkv biases, Qwen3 qk-norm."""
    count = f.integer("num_hidden_layers")
    kinds = f.strings("layer_types")
    other = next((i for i, kind in enumerate(kinds) if kind != "full_attention"), None)
    if other is not None:
        raise JetExportError(
            f"{f.where}: layer_types[{other}] is {kinds[other]!r}; {model_type} models are run with full_attention."
        )
    if kinds:
        _check_count(f, kinds)
    if not 0 < count <= 2**16:  # before a tuple of that length is made
        raise JetExportError(f"{f.where}: num_hidden_layers is {count:,}.")
    qwen3 = model_type == "qwen3"
    return {
        "layer_types": ("attn",) * count,
        "head_dim": _head_dim(f, QWEN3_HEAD_DIM if qwen3 else None),
        "qk_norm": qwen3,
        "qkv_bias": not qwen3,
        **NO_JET_LAYERS,
    }


def _qwen3_5(f: Fields) -> dict[str, Any]:
    own = qwen3_5_fields(f)
    _check_count(f, own["layer_types"])
    return own


NO_JET_LAYERS: Mapping[str, Any] = {"jet_num_heads": 1, "head_k_dim": 32, "expand_v": 2.0}  # sizes that are not used
