"""Joins published tensors for this model's modules: [q | k | v | g | w1] is `in_proj`, [b | a] is `ba_proj`.

qkv_proj and gate_up_proj keep their published parts: TensorRT-LLM's own mapper joins those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8_checkpoint import kv_scale_names, scale_names
from jet_export.model.weights import checkpoint_layout
from jet_export.trtllm.adapt import NATIVE
from jet_export.utils.errors import JetExportError


def module_name(param: str) -> str:
    """layers.0.self_attn.in_proj.weight -> model.layers.0.self_attn.in_proj.weight; lm_head stays."""
    return param if param.startswith("lm_head") else f"model.{param}"


def fuse_weights(weights: Mapping[str, Any], c: JetNemotronConfig) -> dict[str, Tensor]:
    """Tensors under the names of modeling.py's parameters. Values may be lazy slices of a file.

    Raises JetExportError for a missing tensor, scales that differ within a fused projection, and an FP8 lm_head, which
    TensorRT-LLM's LMHead does not take.
    """
    if "lm_head.weight_scale" in weights:
        raise JetExportError(
            "lm_head is FP8, which TensorRT-LLM's LMHead does not take.", "Export without --fp8-lm-head."
        )
    out: dict[str, Tensor] = {}
    parts: dict[str, list[str]] = {}
    for name, s in checkpoint_layout(c).items():
        if name not in weights:
            raise JetExportError(f"{name} is missing from the checkpoint.", "It does not match config.json.")
        if s.param.split(".")[-2] in NATIVE:
            out.update({n: weights[n][...] for n in (name, *scale_names(name)) if n in weights})
        else:
            parts.setdefault(s.param, []).append(name)
    for param, names in parts.items():
        out[module_name(param)] = _join([weights[n][...] for n in names])
        for attr in ("weight_scale", "input_scale"):
            scales = {n: weights[s][...] for n in names for s in scale_names(n) if s.endswith(attr) and s in weights}
            if scales:
                out[module_name(param).removesuffix("weight") + attr] = _one(scales, names, attr)
    out.update({n: weights[n][...] for n in kv_scale_names(c) if n in weights})
    return out


def _join(tensors: list[Tensor]) -> Tensor:
    """Concatenated rows; FP8 as bytes, since torch does not concatenate FP8 tensors."""
    if len(tensors) == 1:
        return tensors[0]
    dtypes = {t.dtype for t in tensors}
    if dtypes == {torch.float8_e4m3fn}:
        return torch.cat([t.view(torch.uint8) for t in tensors]).view(torch.float8_e4m3fn)
    return torch.cat(tensors)


def _one(scales: dict[str, Tensor], names: list[str], attr: str) -> Tensor:
    first = next(iter(scales.values()))
    differing = [n for n in names if n not in scales or not torch.equal(scales[n].reshape(()), first.reshape(()))]
    if differing:
        raise JetExportError(
            f"{differing[0]}: {attr} is not that of {names[0]}.",
            "They are one FP8 product here: `jet-export export-hf` writes such checkpoints.",
        )
    return first.reshape(())
