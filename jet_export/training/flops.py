"""Model FLOPs of a token, for MFU: products with weights alone (no attention scores, no recomputation)."""

from __future__ import annotations

import torch
from torch import nn

from jet_export.training.model import TrainingModel
from jet_export.training.recipe import StageRecipe

PEAK_BF16 = {  # dense, of NVIDIA's data sheets
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12, "B300": 2250e12,
    "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Of the GPU in bf16; None where it is not in the table, or a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def flops_per_token(student: TrainingModel, teacher: TrainingModel | None, stage: StageRecipe) -> float:
    """2 for each weight in each product: teacher forward, student forward, and backward into activations (the layers
    above the lowest that trains; with features the JetBlocks alone) and into weights that train."""
    features = stage.loss == "features"
    forward = _weights(student, mixers_only=features)
    trained = sum(m.weight.numel() for m in _linears(student, features) if m.weight.requires_grad)
    total = 2.0 * (forward + (0 if features else forward) + trained)
    if teacher is not None:
        total += 2.0 * _weights(teacher) - (2.0 * teacher.lm_head.weight.numel() if features else 0.0)
    return total


def _weights(model: TrainingModel, mixers_only: bool = False) -> int:
    return sum(m.weight.numel() for m in _linears(model, mixers_only))


def _linears(model: TrainingModel, mixers_only: bool) -> list[nn.Linear]:
    names = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    kinds = model.config.layer_types
    jet = {f"layers.{i}.self_attn" for i, kind in enumerate(kinds) if kind == "jet"}
    return [m for name, m in names.items() if not mixers_only or name.rpartition(".")[0] in jet]
