"""Reads the published config.json of Jet-Nemotron, Qwen2(.5), Qwen3 and Qwen3.5 into JetNemotronConfig's fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jet_export.model.config_keys import MODEL_TYPES, check_keys
from jet_export.model.config_schema import (
    CommonKeys,
    JetKeys,
    JetNemotronKeys,
    LayerKeys,
    Qwen35Keys,
    QwenKeys,
    read_keys,
)
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
            f"{where}: model_type is {shown(model_type)}" + (f": {what}." if what else ", not 'jet_nemotron'."),
            "jet-export builds Jet-Nemotron checkpoints, and dense Qwen2(.5), Qwen3 and Qwen3.5: "
            f"{', '.join(MODEL_TYPES)}.",
        )
    if model_type == "jet_nemotron":
        keys: CommonKeys = read_keys(JetNemotronKeys, values, where)
    else:
        keys = read_keys(Qwen35Keys if model_type == TEXT else QwenKeys, values, where)
    check_keys(values, where)
    return {**_common(keys, where), **_own(keys, where), "raw": dict(values)}


def _own(k: CommonKeys, where: str) -> dict[str, Any]:
    """What only this family says."""
    if isinstance(k, JetNemotronKeys):
        return _jet(k, where)
    if isinstance(k, Qwen35Keys):
        return _qwen3_5(k, where)
    assert isinstance(k, QwenKeys)
    return _qwen(k, where)


def _common(k: CommonKeys, where: str) -> dict[str, Any]:
    return {
        "model_type": k.model_type,
        "hidden_size": k.hidden_size,
        "intermediate_size": k.intermediate_size,
        "num_attention_heads": k.num_attention_heads,
        "num_key_value_heads": k.num_attention_heads if k.num_key_value_heads is None else k.num_key_value_heads,
        "vocab_size": k.vocab_size,
        "max_position_embeddings": k.max_position_embeddings,
        "rope_theta": _rope_theta(k, where),
        "rms_norm_eps": k.rms_norm_eps,
        "tie_word_embeddings": k.tie_word_embeddings,
        "bos_token_id": k.bos_token_id,
        "eos_token_id": k.eos_token_id,
    }


def _rope_theta(k: CommonKeys, where: str) -> float:
    """rope_theta, or transformers 5's rope_parameters.rope_theta, or their default; refused where two differ."""
    given = [theta for theta in (k.rope_theta, k.rope_parameters.rope_theta) if theta is not None]
    if len(set(given)) > 1:
        raise JetExportError(f"{where}: rope_theta is {given[0]:g}, and {given[1]:g} in rope_parameters.")
    return given[0] if given else 1e4


def _head_dim(k: JetNemotronKeys | QwenKeys, default: int | None = None) -> int:
    if k.head_dim is not None:
        return k.head_dim
    return default or k.hidden_size // max(k.num_attention_heads, 1)


def _check_count(count: int, layers: Sequence[str], where: str) -> None:
    if count != len(layers):
        raise JetExportError(
            f"{where}: num_hidden_layers is {count}, and layer_types names {len(layers)} layers.",
            "Make them agree: the tensors of a layer would not be read, or be missing.",
        )


def _jet(k: JetNemotronKeys, where: str) -> dict[str, Any]:
    layers, mixers = tuple(k.layer_types), k.efficient_attention_config
    if not layers and k.num_hidden_layers != 0:
        raise JetExportError(f"{where}: layer_types is empty.")
    _check_count(len(layers) if k.num_hidden_layers is None else k.num_hidden_layers, layers, where)
    if "jet" in layers and mixers.jet is None:
        raise JetExportError(f"{where}: {MIXERS}.jet is missing, which the jet layers need.")
    if "swa" in layers and not mixers.swa.window_size:
        raise JetExportError(f"{where}: {MIXERS}.swa.window_size is missing.")
    jet = mixers.jet or JetKeys()
    return {
        "layer_types": layers,
        "head_dim": _head_dim(k),
        "qk_norm": k.qk_norm,
        "qkv_bias": k.qkv_bias,
        "jet_num_heads": jet.num_heads,
        "head_k_dim": jet.head_dim,
        "expand_v": jet.expand_v,
        "conv_size": jet.conv_size,
        "dconv_generator_reduction": jet.dconv_generator_reduction,
        "jet_norm_eps": jet.norm_eps,
        "window_size": mixers.swa.window_size,
        "jet_layers": _jet_layers(jet.layers, where),
    }


def _jet_layers(layers: Mapping[str, LayerKeys], where: str) -> tuple[tuple[int, JetDims], ...]:
    """`efficient_attention_config.jet.layers`: layer number -> head_dim, expand_v, num_heads."""
    out = []
    for i, layer in layers.items():
        if not i.removeprefix("-").isdecimal() or len(i) > 9:
            raise JetExportError(f"{where}: {MIXERS}.jet.layers has {shown(i)}, which is no layer number.")
        head_v_dim = min(layer.head_dim * layer.expand_v, 2.0**31)  # JetNemotronConfig names its limit
        out.append((int(i), JetDims(layer.num_heads, layer.head_dim, int(max(head_v_dim, 0)))))
    return tuple(sorted(out))


def _qwen(k: QwenKeys, where: str) -> dict[str, Any]:
    """Qwen2(.5) and Qwen3: full attention alone. Qwen2 has qkv biases, Qwen3 qk-norm."""
    other = next((i for i, kind in enumerate(k.layer_types) if kind != "full_attention"), None)
    if other is not None:
        kind = k.layer_types[other]
        raise JetExportError(
            f"{where}: layer_types[{other}] is {shown(kind)}; {k.model_type} models are run with full_attention."
        )
    if k.layer_types:
        _check_count(k.num_hidden_layers, k.layer_types, where)
    if not 0 < k.num_hidden_layers <= 2**16:  # before a tuple of that length is made
        raise JetExportError(f"{where}: num_hidden_layers is {k.num_hidden_layers:,}.")
    qwen3 = k.model_type == "qwen3"
    return {
        "layer_types": ("attn",) * k.num_hidden_layers,
        "head_dim": _head_dim(k, QWEN3_HEAD_DIM if qwen3 else None),
        "qk_norm": qwen3,
        "qkv_bias": not qwen3,
        **NO_JET_LAYERS,
    }


def _qwen3_5(k: Qwen35Keys, where: str) -> dict[str, Any]:
    own = qwen3_5_fields(k, where)
    _check_count(k.num_hidden_layers, own["layer_types"], where)
    return own


NO_JET_LAYERS: Mapping[str, Any] = {"jet_num_heads": 1, "head_k_dim": 32, "expand_v": 2.0}  # sizes that are not used
