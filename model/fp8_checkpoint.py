"""FP8 in a published checkpoint: the unified Hugging Face format of nvidia-modelopt.

    X.weight                             E4M3 codes; X.weight_scale, X.input_scale [] fp32: value = code * scale
    ...self_attn.k_proj.k_scale, v_proj.v_scale   [] fp32, of an FP8 KV cache: code = value / scale
    hf_quant_config.json                 producer, quantization: quant_algo, kv_cache_quant_algo, exclude_modules
    config.json, quantization_config     the same, as compressed-tensors spells it

Our projections are fused and have one scale each, which the published tensors repeat. Reading them back is therefore
exact: the fused codes and scales are those that were written.
Source: nvidia-modelopt 0.47, torch/export/unified_export_hf.py, quant_utils.py and convert_hf_config.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.fp8_blocks import block_size
from jet_export.utils.errors import JetExportError

SCALES = ("weight_scale", "input_scale")
HF_QUANT_CONFIG = "hf_quant_config.json"
FP8_GROUP = {"dynamic": False, "num_bits": 8, "type": "float"}


def kv_scale_names(c: JetNemotronConfig) -> dict[str, tuple[int, str]]:
    """Published name -> (layer, attribute of its Attention)."""
    return {
        f"model.layers.{i}.self_attn.{attr[0]}_proj.{attr}": (i, attr)
        for i, kind in enumerate(c.layer_types)
        if kind != "jet"
        for attr in ("k_scale", "v_scale")
    }


def scale_names(weight: str) -> tuple[str, ...]:
    """X.weight -> X.weight_scale, X.input_scale."""
    return tuple(f"{weight.removesuffix('.weight')}.{s}" for s in SCALES)


def quantised_modules(param_of: Mapping[str, str], names: Iterable[str], where: str) -> list[str]:
    """Our modules that a checkpoint holds in FP8, told by its scales. `param_of`: published tensor -> our parameter.

    Raises JetExportError if only part of a fused projection is FP8, or a scale is missing.
    """
    present, parts = set(names), dict[str, list[str]]()
    for name, param in param_of.items():
        if param.endswith(".weight"):
            parts.setdefault(param.removesuffix(".weight"), []).append(name)
    found = []
    for module, weights in parts.items():
        wanted = [s for w in weights for s in scale_names(w)]
        missing = [s for s in wanted if s not in present]
        if missing and len(missing) < len(wanted):
            raise JetExportError(
                f"{where}: {missing[0]} is missing, though {next(s for s in wanted if s in present)} is there.",
                f"The projections {', '.join(w.removesuffix('.weight') for w in weights)} share one FP8 product here.",
            )
        if not missing:
            found.append(module)
    return found


def place_fp8_linears(model: nn.Module, modules: Iterable[str]) -> None:
    """Unfilled Fp8Linear layers in place of these nn.Linear ones, on the same device."""
    for path in modules:
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise JetExportError(f"{path}: the checkpoint holds it in FP8, which only linear layers can be here.")
        w, has_bias = linear.weight, linear.bias is not None
        empty = Fp8Linear.empty(linear.in_features, linear.out_features, has_bias, w.dtype, w.device)
        model.set_submodule(path, empty)


def scale_value(tensor: Tensor, name: str, file: Path) -> float:
    """Raises JetExportError unless it is one finite, positive number."""
    value = float(tensor.float().item()) if tensor.numel() == 1 else math.nan
    if not (math.isfinite(value) and value > 0):
        what = f"is {value:g}" if tensor.numel() == 1 else f"has shape {list(tensor.shape)}"
        raise JetExportError(
            f"{file}: {name} {what}.", "Only one positive scale a tensor (quant_algo FP8, static) is read."
        )
    return value


def check_quant_algo(directory: Path, config: JetNemotronConfig) -> None:
    """Raise JetExportError for a checkpoint with any quantisation other than FP8 per tensor, or per block."""
    described: list[tuple[str, dict[str, Any]]] = []
    in_config = config.raw.get("quantization_config")
    if isinstance(in_config, dict) and not block_size(config, str(directory / "config.json")):
        described.append(("config.json: quantization_config", in_config))
    path = directory / HF_QUANT_CONFIG
    if path.exists():
        try:
            described.append((HF_QUANT_CONFIG, json.loads(path.read_text(encoding="utf-8"))["quantization"]))
        except (ValueError, KeyError, TypeError):
            raise JetExportError(f"{path}: not a quantisation config of nvidia-modelopt.") from None
    for where, values in described:
        algo = values.get("quant_algo", values.get("quant_method"))
        if algo not in ("FP8", "modelopt", None):
            raise JetExportError(
                f"{directory / where}: quant_algo is {algo}.",
                "Read here: FP8 (per tensor, static; or of blocks, quant_method fp8) and none.",
            )


def is_fp8_checkpoint(config: JetNemotronConfig) -> bool:
    """Judged by its config.json alone."""
    return (config.raw.get("quantization_config") or {}).get("quant_algo") == "FP8"


def holds_kv_scales(names: Iterable[str], config: JetNemotronConfig) -> bool:
    present = set(names)
    return all(name in present for name in kv_scale_names(config))


def fp8_tensors(model: nn.Module, param_of: Mapping[str, str]) -> dict[str, Tensor]:
    """X.weight_scale and X.input_scale of every published weight that is FP8: [] fp32."""
    out = {}
    for name, param in param_of.items():
        module = model.get_submodule(param.rpartition(".")[0]) if "." in param else model
        if isinstance(module, Fp8Linear) and param.endswith(".weight"):
            for scale, value in zip(scale_names(name), (module.weight_scale, module.input_scale), strict=True):
                out[scale] = value.detach().reshape(()).clone()  # safetensors stores no tensor twice
    return out


def kv_scale_tensors(model: Any) -> dict[str, Tensor]:
    """The KV cache's scales, [] fp32."""
    names = kv_scale_names(model.config)
    return {n: torch.tensor(getattr(model.layers[i].self_attn, attr)) for n, (i, attr) in names.items()}


def exclude_modules(param_of: Mapping[str, str], fp8: Iterable[str], linears: Iterable[str]) -> list[str]:
    """Published names of the linear layers that are not FP8. `fp8`, `linears`: our module paths."""
    others = {f"{m}.weight" for m in linears} - {f"{m}.weight" for m in fp8}
    names = {name.removesuffix(".weight") for name, param in param_of.items() if param in others}
    return sorted(names | ({"lm_head"} if "lm_head.weight" in others else set()))


def hf_quant_config(fp8: bool, kv_fp8: bool, exclude: list[str], producer_version: str) -> dict[str, Any]:
    """What modelopt writes to hf_quant_config.json."""
    quantization: dict[str, Any] = {
        "quant_algo": "FP8" if fp8 else None,
        "kv_cache_quant_algo": "FP8" if kv_fp8 else None,
    }
    if fp8:
        quantization["exclude_modules"] = exclude
    return {"producer": {"name": "modelopt", "version": producer_version}, "quantization": quantization}


def quantization_config(quant: dict[str, Any]) -> dict[str, Any]:
    """The same for config.json, as modelopt's convert_hf_quant_config_format makes it."""
    q, out = quant["quantization"], dict[str, Any]()
    if q["quant_algo"] == "FP8":
        group = {"input_activations": dict(FP8_GROUP), "weights": dict(FP8_GROUP), "targets": ["Linear"]}
        out["config_groups"] = {"group_0": group}
    out["ignore"] = q.get("exclude_modules", [])
    if q["quant_algo"]:
        out["quant_algo"] = q["quant_algo"]
    if q["kv_cache_quant_algo"] == "FP8":
        out["kv_cache_scheme"] = dict(FP8_GROUP)
    return {**out, "producer": quant["producer"], "quant_method": "modelopt"}
