"""The one module that depends on TensorRT-LLM's versions and on the assumptions of its hybrid-model code.

What is hard-coded there, and how this model complies:

- Which models have recurrent states. `config_utils.is_nemotron_hybrid(config)` is "the config has a non-empty
  `hybrid_override_pattern`", `is_qwen3_next` an architecture name; every other model gets only a KV cache. The
  config (config.py) therefore carries the fields of a Nemotron-H config, `hybrid_fields`: "M" is a layer with states,
  "*" one with a KV cache, and the sizes give exactly our states:
      ssm state  [mamba_num_heads, mamba_head_dim, ssm_state_size]                       = [H, V, K]
      conv state [mamba_num_heads * mamba_head_dim + 2 n_groups ssm_state_size, conv_kernel - 1] = [H * V, W - 1]
  n_groups is 0: JetBlock convolves its values only. No function of TensorRT-LLM is replaced.
- The state's dtype. "auto" is the model dtype in 1.2, and the config's `mamba_ssm_cache_dtype` in 1.3. JetBlock needs
  fp32, so anything else is refused (`check_model_config`) with the option to set.
- Where the states' row indices are. 1.2: `kv_cache_manager.get_state_indices()`. 1.3: that function takes the
  requests, and `attn_metadata.mamba_metadata.state_indices` holds its result, filled before the model runs.
- Names in `exclude_modules` are those of the published checkpoint; a fused projection is excluded with its parts
  (`excluded_modules`), since TensorRT-LLM does that for qkv_proj and gate_up_proj only.

An unknown version is refused with one message; JET_EXPORT_TRTLLM_ANY_VERSION=1 tries it anyway.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from jet_export.model.config import JetNemotronConfig
from jet_export.model.weights import checkpoint_layout
from jet_export.trtllm.protocols import AttentionMetadataLike, ModelConfigLike
from jet_export.utils.errors import JetExportError

KNOWN = ("1.2", "1.3")
ANY_VERSION = "JET_EXPORT_TRTLLM_ANY_VERSION"
NATIVE = ("qkv_proj", "gate_up_proj")  # projections that TensorRT-LLM fuses itself


def version_line(version: str) -> str:
    """ "1.3.0rc20" -> "1.3". Raises JetExportError for a version whose source was not read."""
    line = ".".join(version.split(".")[:2])
    if line in KNOWN:
        return line
    if os.environ.get(ANY_VERSION) == "1":
        return KNOWN[-1]
    raise JetExportError(
        f"jet_export.trtllm: tensorrt_llm {version} is not known here; its model interfaces change between releases.",
        f"Known: {', '.join(f'{v}.*' for v in KNOWN)}. To try it as {KNOWN[-1]}: {ANY_VERSION}=1",
    )


def hybrid_fields(c: JetNemotronConfig) -> dict[str, Any]:
    """The fields by which TensorRT-LLM recognises a hybrid model and sizes its states."""
    return {
        "hybrid_override_pattern": "".join("M" if kind == "jet" else "*" for kind in c.layer_types),
        "mamba_num_heads": c.jet_num_heads,
        "mamba_head_dim": c.head_v_dim,
        "ssm_state_size": c.head_k_dim,
        "conv_kernel": c.conv_size,
        "n_groups": 0,
        "mamba_ssm_cache_dtype": "float32",
    }


def check_model_config(model_config: ModelConfigLike, version: str) -> None:
    """Refuse unsupported options before weights are loaded. Raises JetExportError."""
    version_line(version)
    m, quant = model_config.mapping, model_config.quant_config
    if m.tp_size != 1 or m.pp_size != 1 or m.enable_attention_dp:
        raise JetExportError(
            f"JetNemotronForCausalLM runs on one GPU; tp_size is {m.tp_size}, pp_size {m.pp_size}, "
            f"enable_attention_dp {m.enable_attention_dp}.",
            "Start one server a GPU.",
        )
    for name, value in (("speculative decoding", model_config.spec_config), ("LoRA", model_config.lora_config)):
        if value is not None:
            raise JetExportError(f"JetNemotronForCausalLM: {name} is not supported.", "Leave it out.")
    algo = None if quant.quant_algo is None else str(getattr(quant.quant_algo, "value", quant.quant_algo))
    if algo not in (None, "FP8"):
        raise JetExportError(f"JetNemotronForCausalLM: quant_algo {algo} is not supported.", "Export bf16 or --fp8.")
    if quant.mamba_ssm_cache_dtype is not torch.float32:
        raise JetExportError(
            f"JetNemotronForCausalLM: the recurrent state would be {quant.mamba_ssm_cache_dtype}; it needs float32.",
            "In the file given by --extra_llm_api_options: kv_cache_config: {mamba_ssm_cache_dtype: float32, "
            "enable_block_reuse: false}",
        )


def state_slots(metadata: AttentionMetadataLike, line: str) -> Tensor:
    """[num_seqs] int32 on the device: the state row of each sequence of the batch, contexts first."""
    manager = metadata.kv_cache_manager
    if manager is None:
        raise JetExportError("JetNemotronForCausalLM: called without a cache manager, which holds its states.")
    if line == "1.2":
        return manager.get_state_indices()[: metadata.num_seqs]
    mamba = getattr(metadata, "mamba_metadata", None)
    if not mamba:  # None or False: not a hybrid manager, or a 1.3 release candidate that lacks the field
        raise JetExportError(
            "JetNemotronForCausalLM: attn_metadata.mamba_metadata is not there.",
            "Early 1.3 release candidates lack it: use 1.2.1 or a later one.",
        )
    slots: Tensor = mamba.state_indices[: metadata.num_seqs]
    return slots


def excluded_modules(c: JetNemotronConfig, exclude: list[str] | None) -> list[str] | None:
    """`exclude_modules` and the fused modules whose published parts are all in it. None stays None."""
    if exclude is None:
        return None
    parts: dict[str, list[str]] = {}
    for name, s in checkpoint_layout(c).items():
        module = s.param.removesuffix(".weight")
        if s.param.endswith("_proj.weight") or s.param.endswith(".w2.weight"):
            parts.setdefault(module, []).append(name.removesuffix(".weight"))
    out = list(exclude)
    for module, names in parts.items():
        hits = [any(fnmatchcase(n, pattern) for pattern in exclude) for n in names]
        if all(hits):
            out.append(f"model.{module}")
        elif any(hits) and module.rsplit(".", 1)[-1] not in NATIVE:
            raise JetExportError(
                f"exclude_modules leaves out {names[hits.index(True)]} and not {names[hits.index(False)]}.",
                "They are one FP8 product here: `jet-export export-hf` writes such checkpoints.",
            )
    return list(dict.fromkeys(out))


def architecture(pretrained: Any) -> JetNemotronConfig:
    """Our config from TensorRT-LLM's `pretrained_config`, in which config.py keeps the published fields."""
    fields: Mapping[str, Any] = pretrained.jet_nemotron
    return JetNemotronConfig.from_dict(dict(fields), where="config.json")
