"""Qwen3.5 as a case of this model: config.json's keys, and the sizes they mean.

    linear_attention   a `jet` layer whose convolution is static and over q, k and the values (jet_conv), and whose key
                       heads may serve several value heads each (jet_num_key_heads)
    full_attention     an `attn` layer with qk-norm, a sigmoid gate on its output (output_gate) and a rotary embedding
                       of a part of the head (rotary_dim)
    RMSNorm            multiplies by 1 + weight (norm_offset); the weights are read as 1 + w, kept in fp32

Text alone is run. There the three position ids of multimodal RoPE (`mrope_section`) are one and the same, so the rotary
embedding is the plain one. `model_type` qwen3_5 is the multimodal model: its text_config is read, its vision tower is
left out. The multi-token-prediction layer is in mtp.py. Source: transformers 5, models/qwen3_5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jet_export.model.config_schema import Qwen35Keys
from jet_export.model.jet_dims import JetDims, expand_v_of
from jet_export.utils.errors import JetExportError, shown

TEXT, MULTIMODAL = "qwen3_5_text", "qwen3_5"
KINDS = {"linear_attention": "jet", "full_attention": "attn"}
PUBLISHED_KINDS = {ours: theirs for theirs, ours in KINDS.items()}
ROTARY = 0.25  # transformers' default of partial_rotary_factor
MTP = "mtp."  # the first name of the tensors of the multi-token-prediction layer
LEFT_OUT = {"model.visual.": "vision tower", MTP: "multi-token-prediction layer"}
BESIDE_TEXT = ("tie_word_embeddings", "quantization_config")  # of the whole model, not in its text_config
RELATIVES = {
    "qwen3_5_moe": "a mixture of experts",
    "qwen3_5_moe_text": "a mixture of experts",
    "qwen3_next": "Qwen3-Next, whose projections are laid out otherwise and whose MLPs are mixtures of experts",
    "qwen3_moe": "a mixture of experts",
    "kimi_linear": "Kimi Linear, whose delta rule decays each channel by itself and whose attention is latent (MLA)",
}


def text_part(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The text model's config.json in that of a multimodal one; any other as it is."""
    if values.get("model_type") != MULTIMODAL:
        return values
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise JetExportError(
            f"{where}: model_type is {MULTIMODAL!r}, and text_config, which describes its text model, is missing."
        )
    beside = {key: values[key] for key in BESIDE_TEXT if values.get(key) is not None}
    for key, value in beside.items():
        if text.get(key, value) != value:
            raise JetExportError(
                f"{where}: {key} is {shown(value)}, and {shown(text[key])} in text_config. Make them agree."
            )
    return {**text, **beside, "model_type": TEXT}


def text_name(name: str) -> str:
    """A tensor of the multimodal checkpoint, as the text model's own checkpoint names it."""
    return name.replace("model.language_model.", "model.", 1)


def left_out(names: Iterable[str]) -> str:
    """The parts of a checkpoint that are not run, with their numbers of tensors; "" if it has none."""
    names = list(names)
    counts = [(what, sum(name.startswith(prefix) for name in names), prefix) for prefix, what in LEFT_OUT.items()]
    return ", ".join(f"the {what} ({n} tensors, {prefix}*)" for what, n, prefix in counts if n)


def relative(model_type: Any) -> str | None:
    """What a model is that is near to Qwen3.5 and not run here."""
    return RELATIVES.get(model_type) if isinstance(model_type, str) else None


def not_yet(config: Any, what: str, todo: str = "") -> None:
    """Raise JetExportError where a tool does not run this family's layers. `config`: a JetNemotronConfig."""
    if config.model_type == TEXT:
        raise JetExportError(f"{what}: not for {TEXT} models, whose convolutions are static and heads shared.", todo)


def qwen3_5_fields(k: Qwen35Keys, where: str) -> dict[str, Any]:
    """Fields of JetNemotronConfig that are this family's own."""
    kinds = _kinds(k, where)
    unknown = next((i for i, kind in enumerate(kinds) if kind not in KINDS), None)
    if unknown is not None:
        raise JetExportError(
            f"{where}: layer_types[{unknown}] is {shown(kinds[unknown])}.", f"Known in {TEXT}: {', '.join(KINDS)}."
        )
    K, V, H = k.linear_key_head_dim, k.linear_value_head_dim, k.linear_num_value_heads
    return {
        "layer_types": tuple(KINDS[kind] for kind in kinds),
        "head_dim": k.head_dim,
        "rotary_dim": int(k.head_dim * rotary_factor(k, where)),
        "qk_norm": True,
        "qkv_bias": False,
        "output_gate": True,
        "norm_offset": True,
        "jet_conv": "static",
        "jet_num_heads": H,
        "jet_num_key_heads": k.linear_num_key_heads,
        "head_k_dim": K,
        "expand_v": expand_v_of(JetDims(H, K, V)) if K else 1.0,
        "conv_size": k.linear_conv_kernel_dim,
        "jet_norm_eps": k.rms_norm_eps,
    }


def _kinds(k: Qwen35Keys, where: str) -> Sequence[str]:
    """layer_types, or what full_attention_interval makes of num_hidden_layers."""
    if not 0 <= k.num_hidden_layers <= 2**16:  # before a tuple of that length is made
        raise JetExportError(f"{where}: num_hidden_layers is {k.num_hidden_layers:,}.")
    if k.layer_types:
        return k.layer_types
    interval = max(k.full_attention_interval, 1)
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(k.num_hidden_layers)]


def rotary_factor(k: Qwen35Keys, where: str) -> float:
    """The share of a head that is rotated: in rope_parameters, beside it, or the default."""
    beside = (k.rope_parameters.partial_rotary_factor, k.partial_rotary_factor)
    given = [factor for factor in beside if factor is not None]
    factor = given[0] if given else ROTARY
    if len(set(given)) > 1 or not 0 < factor <= 1:
        raise JetExportError(f"{where}: partial_rotary_factor is {' and '.join(f'{x:g}' for x in given)}.")
    return factor


def published(c: Any) -> dict[str, Any]:
    """The keys of config.json that say this family's mixers; `c`: a JetNemotronConfig."""
    factor = c.rope_dim / c.head_dim
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": factor}
    return {
        "layer_types": [PUBLISHED_KINDS[kind] for kind in c.layer_types],
        "linear_num_value_heads": c.jet_num_heads,
        "linear_num_key_heads": c.key_heads,
        "linear_key_head_dim": c.head_k_dim,
        "linear_value_head_dim": c.head_v_dim,
        "linear_conv_kernel_dim": c.conv_size,
        "attn_output_gate": True,
        "partial_rotary_factor": factor,
        "rope_parameters": {**(c.raw.get("rope_parameters") or {}), **rope},
    }
