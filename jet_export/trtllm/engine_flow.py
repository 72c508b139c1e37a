"""Legacy: a checkpoint for TensorRT-LLM's engine flow (`trtllm-build`, in 1.2.1 and up to 1.3.0rc20; gone since).

config.json and rank0.safetensors, one GPU. `layer_types`, `state_size`, `conv_kernel`, `rnn_hidden_size`,
`rnn_head_size` and `rnn_conv_dim_size` are the fields by which its C++ runtime allocates paged states:

    rnn state  [rnn_hidden_size / rnn_head_size, state_size, rnn_head_size] fp32 = [H, K, V]
    conv state [conv_kernel - 1, rnn_conv_dim_size]                              = [W - 1, D]

which are jet::jet_block's own layouts.

trtllm-build has no such model: it needs one by `--model_cls_file`, described in
docs/backends/tensorrt-llm.md. Not tried.
Source: cpp/tensorrt_llm/batch_manager/rnnStateManager.cpp, tensorrt_llm/models/recurrentgemma/model.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.weights import save_tensors
from jet_export.utils.version import __version__

LEGACY = (
    "Legacy: for TensorRT-LLM's engine flow (1.2.1 to 1.3.0rc20), which needs a model by --model_cls_file; "
    "not run against TensorRT-LLM. See docs/backends/tensorrt-llm.md."
)
LAYER = {  # our module -> TensorRT-LLM's name
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm",
    "mlp.down_proj": "mlp.proj",
    "self_attn.qkv_proj": "attention.qkv",
    "self_attn.in_proj": "recurrent.in_proj",
    "self_attn.ba_proj": "recurrent.ba_proj",
    "self_attn.w2": "recurrent.w2",
}
GATED = ("mlp.fc", "mlp.gate")  # its GatedMLP is act(fc(x)) * gate(x): our gate_up_proj's halves, in this order


def save_engine_flow(model: JetNemotronForCausalLM, directory: Path, kv_fp8: bool) -> None:
    tensors = engine_flow_tensors(model, kv_fp8)
    save_tensors({name: t.cpu() for name, t in tensors.items()}, directory / "rank0.safetensors")
    config = engine_flow_config(model, kv_fp8)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def engine_flow_config(model: JetNemotronForCausalLM, kv_fp8: bool) -> dict[str, Any]:
    """The config that PretrainedConfig.from_json_file reads; the published fields are under `jet_nemotron`."""
    c = model.config
    fp8 = any(isinstance(m, Fp8Linear) for m in model.modules())
    attention = [kind for kind in c.layer_types if kind != "jet"]
    return {
        "legacy": LEGACY,
        "producer": {"name": "jet-export", "version": __version__},
        "architecture": "JetNemotronForCausalLM",
        "dtype": str(model.dtype).removeprefix("torch."),
        "logits_dtype": "float32",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_size": c.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": c.rope_theta,
        "rotary_pct": 1.0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {
            "quant_algo": "FP8" if fp8 else None,
            "kv_cache_quant_algo": "FP8" if kv_fp8 else None,
            "exclude_modules": excluded(model) if fp8 else None,
        },
        **recurrent_fields(c),
        # for the runtime's --max_attention_window: one per attention layer
        "max_attention_window": [c.window_size if kind == "swa" else c.max_position_embeddings for kind in attention],
        "jet_nemotron": {k: v for k, v in c.to_dict().items() if k not in ("quantization_config", "auto_map")},
    }


def recurrent_fields(c: JetNemotronConfig) -> dict[str, Any]:
    """The fields that size the runtime's states."""
    return {
        "layer_types": ["recurrent" if kind == "jet" else "attention" for kind in c.layer_types],
        "state_size": c.head_k_dim,
        "state_dtype": "float32",
        "conv_kernel": c.conv_size,
        "rnn_hidden_size": c.jet_value_dim,
        "rnn_head_size": c.head_v_dim,
        "rnn_conv_dim_size": c.jet_value_dim,
    }


def engine_flow_tensors(model: JetNemotronForCausalLM, kv_fp8: bool) -> dict[str, Tensor]:
    """Our parameters under TensorRT-LLM's names; FP8 layers also have a weight and an activation scaling factor."""
    out = {
        "transformer.vocab_embedding.weight": model.embed_tokens.weight.detach(),
        "transformer.ln_f.weight": model.norm.weight.detach(),
    }
    tied = getattr(model.lm_head, "weight", None) is model.embed_tokens.weight
    _put(out, "lm_head", model.lm_head, slice(None), copy=tied)  # TensorRT-LLM has no tied embeddings here
    for i, kind in enumerate(model.config.layer_types):
        layer: Any = model.layers[i]
        prefix = f"transformer.layers.{i}"
        for ours, theirs in LAYER.items():
            module = _submodule(layer, ours)
            if module is not None:
                _put(out, f"{prefix}.{theirs}", module, slice(None))
        block = "recurrent.o_proj" if kind == "jet" else "attention.dense"
        attn: Any = layer.self_attn
        _put(out, f"{prefix}.{block}", attn.o_proj, slice(None))
        half = model.config.intermediate_size
        for name, rows in zip(GATED, (slice(0, half), slice(half, None)), strict=True):
            _put(out, f"{prefix}.{name}", layer.mlp.gate_up_proj, rows)
        if kind == "jet":
            out.update({f"{prefix}.recurrent.{p}": getattr(attn, p).detach() for p in ("A_log", "dt_bias", "o_norm")})
        elif kv_fp8:  # TensorRT-LLM has one scale for keys and values
            out[f"{prefix}.attention.kv_cache_scaling_factor"] = torch.tensor([max(attn.k_scale, attn.v_scale)])
    return out


def _submodule(layer: Any, path: str) -> Any:
    for part in path.split("."):
        layer = getattr(layer, part, None)
    return layer


def _put(out: dict[str, Tensor], name: str, module: Any, rows: slice, copy: bool = False) -> None:
    weight = module.weight.detach()[rows]
    out[f"{name}.weight"] = weight.clone() if copy else weight
    if getattr(module, "bias", None) is not None:
        out[f"{name}.bias"] = module.bias.detach()[rows]
    if isinstance(module, Fp8Linear):
        out[f"{name}.weights_scaling_factor"] = module.weight_scale.clone()
        out[f"{name}.activation_scaling_factor"] = module.input_scale.clone()


def excluded(model: JetNemotronForCausalLM) -> list[str]:
    """TensorRT-LLM's names of the embedding and of the linear layers that are not FP8."""
    tensors = engine_flow_tensors(model, kv_fp8=False)
    weights = [n.removesuffix(".weight") for n in tensors if n.endswith(".weight") and tensors[n].dim() == 2]
    return [n for n in weights if f"{n}.weights_scaling_factor" not in tensors]
