"""Every key of a config.json that is known here, and what becomes of it.

    USED      read: it changes the model
    FIXED     refused unless it has a value that is implemented; absent and null are taken for it
    NO_EFFECT changes nothing that is computed here: training, other software's defaults, notes

Any other key is a warning that names it: it may change what the model computes elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jet_export.model.qwen3_5 import TEXT
from jet_export.utils.errors import JetExportError, shown

MODEL_TYPES = ("jet_nemotron", "qwen2", "qwen3", TEXT)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMMON = _names(
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "layer_types vocab_size max_position_embeddings rope_theta rope_scaling rope_parameters rms_norm_eps "
    "tie_word_embeddings bos_token_id eos_token_id initializer_range quantization_config"
)
USED: Mapping[str, frozenset[str]] = {
    "jet_nemotron": COMMON | {"efficient_attention_config", "qk_norm", "qkv_bias"},
    "qwen2": COMMON,
    "qwen3": COMMON,
    TEXT: COMMON
    | _names(
        "full_attention_interval linear_num_value_heads linear_num_key_heads linear_key_head_dim "
        "linear_value_head_dim linear_conv_kernel_dim partial_rotary_factor"
    ),
}
FIXED_IN_ALL: Mapping[str, Collection[Any]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
FIXED_IN: Mapping[str, Mapping[str, Collection[Any]]] = {
    TEXT: {
        "attn_output_gate": (True,),
        "output_gate_type": ("silu", "swish"),  # of the Gated DeltaNets' norm
        "mlp_only_layers": ([],),  # of a mixture of experts
    }
}
ATTENTION_BIAS = {"jet_nemotron": True, "qwen2": True, "qwen3": False, TEXT: False}  # of q, k, v; o_proj never has one
NO_EFFECT = _names(
    # which software, which files, which dtype they were saved in (--dtype decides here)
    "architectures auto_map torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash "
    "tokenizer_class unsloth_version unsloth_fixed jet_export_search "
    # how other software runs the model
    "use_cache _attn_implementation _attn_implementation_autoset attn_implementation output_attentions "
    "output_hidden_states return_dict return_dict_in_generate output_scores torchscript use_bfloat16 tf_legacy_loss "
    "chunk_size_feed_forward pruned_heads is_decoder cross_attention_hidden_size tie_encoder_decoder "
    # read only with use_sliding_window, which is refused
    "sliding_window max_window_layers "
    # precision of the recurrent state in other software (fp32; --state-dtype decides here); layers that are left out
    "mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings "
    # training and classification
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop id2label label2id num_labels problem_type "
    "finetuning_task task_specific_params pad_token_id sep_token_id decoder_start_token_id prefix "
    # defaults of generation, which requests set here
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
)
JET_KEYS = _names("conv_size dconv_generator_reduction expand_v head_dim num_heads norm_eps layers")
JET_NO_EFFECT = _names("mode dconv_implementation")  # which published kernel; one algorithm
SWA_KEYS = _names("window_size")
LAYER_KEYS = _names("head_dim expand_v num_heads")
ROPE_KEYS = _names("rope_theta rope_type type partial_rotary_factor")
TEXT_ROPE_KEYS = ROPE_KEYS | _names("mrope_section mrope_interleaved")  # text has one position on all three axes


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raise JetExportError for a key with a value that is not implemented, naming both."""
    model_type = values["model_type"]
    bias = values.get("qkv_bias", True) if model_type == "jet_nemotron" else ATTENTION_BIAS[model_type]
    for key, implemented in {**fixed(model_type), "attention_bias": (bias,)}.items():
        value = values.get(key)
        if value is not None and not any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in implemented
        ):
            only = " or ".join(repr(v) for v in implemented)
            raise JetExportError(
                f"{where}: {key} is {shown(value)}; {model_type} models are run here with {only} only.",
                "The model would compute something else than its checkpoint means.",
            )
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(values.get(key) or {}, f"{where}: {key}", model_type)


def fixed(model_type: str) -> dict[str, Collection[Any]]:
    """The keys that have one value here, and which."""
    every = {**FIXED_IN_ALL, **FIXED_IN.get(model_type, {})}
    return {key: values for key, values in every.items() if key not in USED[model_type]}


def _same(value: Any, implemented: Any) -> bool:
    return bool(value == implemented) and isinstance(value, bool) == isinstance(implemented, bool)  # 0 is not false


def _check_rope(rope: Any, where: str, model_type: str) -> None:
    if not isinstance(rope, dict):
        raise JetExportError(f"{where} is {shown(rope)}, not an object.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if model_type == TEXT:
        scaled = bool(rope.keys() - TEXT_ROPE_KEYS)
    else:
        scaled = bool(rope.keys() - ROPE_KEYS) or rope.get("partial_rotary_factor", 1.0) != 1.0
    if kind != "default" or scaled:
        raise JetExportError(
            f"{where} {shown(rope)} is not supported.", "RoPE is the plain one here: null, or rope_type default."
        )


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys that are neither used, fixed nor known to change nothing, with their path."""
    model_type = values.get("model_type", "jet_nemotron")
    known = USED[model_type] | fixed(model_type).keys() | NO_EFFECT | {"attention_bias"}
    unknown = [key for key in values if key not in known]
    mixers = values.get("efficient_attention_config") if model_type == "jet_nemotron" else None
    if isinstance(mixers, dict):
        prefix = "efficient_attention_config"
        unknown += [f"{prefix}.{key}" for key in mixers if key not in ("jet", "swa")]
        for name, keys in (("jet", JET_KEYS | JET_NO_EFFECT), ("swa", SWA_KEYS)):
            unknown += [f"{prefix}.{name}.{key}" for key in mixers.get(name) or {} if key not in keys]
        layers = (mixers.get("jet") or {}).get("layers") or {}
        for i, layer in layers.items():
            if not isinstance(layer, dict):
                unknown.append(f"{prefix}.jet.layers.{i}")
                continue
            unknown += [f"{prefix}.jet.layers.{i}.{key}" for key in layer if key not in LAYER_KEYS]
    return unknown
