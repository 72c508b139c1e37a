"""What a bundle is built from, and whether the output already holds that build."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jet_export.build.plan import BuildPlan
from jet_export.build.steps import CALIBRATION, versions
from jet_export.bundle.dtypes import dtype_name
from jet_export.bundle.manifest import Manifest
from jet_export.model.hf_files import TOKENIZER, tokenizer_directory
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import sha256_file


def build_inputs(plan: BuildPlan) -> dict[str, Any]:
    """Everything that the bundle depends on; recorded in its manifest."""
    o = plan.options
    inputs: dict[str, Any] = {
        "model": o.model if o.random_weights else plan.source,
        "config": plan.config.to_dict(),
        "weights": f"random, seed {o.seed}" if o.random_weights else _checkpoint_digest(plan.directory),
        "dtype": o.dtype,
        "fp8": o.fp8,
        "kv_cache_dtype": dtype_name(plan.dtypes.kv_cache),
        "state_dtype": dtype_name(plan.dtypes.state),
        "state_interval": plan.dtypes.state_interval,
        "rollback": plan.dtypes.rollback,
        **({"mtp": True} if o.mtp else {}),
        **({"fast_accumulation": True} if o.fast_accumulation else {}),
        "limits": asdict(plan.limits),
        "backend": plan.backend.name,
        "target": plan.target,
        **({"sms": list(plan.sms), "onnx kept": o.keep_onnx} if plan.sms else {}),
        **(
            {"decode_one": o.decode_one, "fuse_decode": o.fuse_decode}
            if plan.build_device.type == "cuda" and plan.backend.name == "inductor"
            else {}
        ),
        **({"tokenizer": sha256_file(tokenizer_directory(o.tokenizer) / TOKENIZER)} if o.tokenizer else {}),
        "versions": versions(plan.backend.name),
    }
    if o.fp8 or plan.dtypes.kv_cache == torch.float8_e4m3fn:
        inputs["calibration"] = sha256_file(o.calibration or CALIBRATION)
        inputs["keep"] = sorted(o.keep)
        inputs["fp8_lm_head"] = o.fp8_lm_head
    return inputs


def _checkpoint_digest(directory: Path | None) -> dict[str, str]:
    if directory is None:
        return {}
    return {p.name: sha256_file(p) for p in sorted(directory.glob("*.safetensors"))}


def up_to_date(plan: BuildPlan, inputs: dict[str, Any]) -> bool:
    """Whether the output was built from these inputs. Raises JetExportError naming what differs, unless --force."""
    if not plan.output.exists() or plan.options.force:
        return False
    if not plan.output.is_dir() or (any(plan.output.iterdir()) and not (plan.output / "manifest.json").exists()):
        raise JetExportError(f"--output {plan.output}: exists and is not a bundle.", "Choose another place.")
    if not any(plan.output.iterdir()):
        return False
    built, now = _flat(Manifest.load(plan.output).build.get("inputs", {})), _flat(inputs)
    differing = sorted(k for k in built.keys() | now.keys() if built.get(k) != now.get(k))
    if not differing:
        return True
    changes = "; ".join(f"{k} was {_short(built.get(k))}, now {_short(now.get(k))}" for k in differing[:3])
    raise JetExportError(
        f"{plan.output}: holds a bundle built from other inputs ({changes}).",
        "Pass --force to replace it, or --output DIR to build beside it.",
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
