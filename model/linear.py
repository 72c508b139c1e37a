"""The linear layers of a model with what stands around them. In the graph of one token a layer is a jet::gemv, which
takes all of it in if the graph is to be fused; elsewhere plain PyTorch, which compilers fuse as they like."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jet_export.model.fp8 import Fp8Linear, quantize
from jet_export.model.mode import fused_mode, one_row_mode, onnx_mode


class RMSNorm(nn.Module):
    """(w * x / sqrt(mean(x^2) + eps)) in fp32, one cast at the end (Qwen2 casts before the weight; this does not)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (self.weight.float() * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)


def add(h: Tensor, y: Tensor) -> Tensor:
    """h + y. The sum of two 16-bit numbers is the same by way of fp32, and Inductor then adds in the kernel that reads
    the sum next; it would give `h + x @ W` to cuBLAS, which first copies h."""
    if h.dtype not in (torch.bfloat16, torch.float16) or onnx_mode():
        return h + y
    return (h.float() + y.float()).to(h.dtype)


def fused(layer: nn.Module) -> bool:
    """Whether the layer is a jet::gemv here that takes in what stands around it."""
    return fused_mode() and isinstance(layer, (nn.Linear, Fp8Linear))


def norm_later(h: Tensor, norm: RMSNorm, *layers: nn.Module) -> tuple[Tensor, RMSNorm | None]:
    """What `project` takes to normalise h for all these layers: itself and the norm, or norm(h) computed once."""
    return (h, norm) if all(map(fused, layers)) else (norm(h), None)


def project(
    layer: nn.Module,
    x: Tensor,  # [T, K]
    norm: RMSNorm | None = None,
    *,
    silu: bool = False,
    residual: Tensor | None = None,  # [T, N]
) -> Tensor:  # [T, N]
    """residual + layer(silu(norm(x))), each of the three if asked for."""
    if fused(layer):
        return gemv(layer, x, norm, silu=silu, residual=residual, dtype=x.dtype if residual is None else residual.dtype)
    x = x if norm is None else norm(x)
    x = F.silu(x) if silu else x
    if one_row_mode() and isinstance(layer, (nn.Linear, Fp8Linear)):
        codes = quantize(x, layer.input_scale) if isinstance(layer, Fp8Linear) else x
        y = gemv(layer, codes, None, dtype=x.dtype)
    else:
        y = layer(x)
    return y if residual is None else add(residual, y)


def project_gated(gate_up: nn.Module, x: Tensor, norm: RMSNorm | None, down: nn.Module) -> Tensor:
    """silu(gate) * up of [gate | up] = gate_up(norm(x)) [T, 2 I] -> [T, I]; where both layers are kernels and `down` is
    an FP8 layer, in the codes that `down` multiplies."""
    if fused(gate_up):
        y_scale = down.input_scale if isinstance(down, Fp8Linear) and fused(down) else None
        return gemv(gate_up, x, norm, gated=True, y_scale=y_scale, dtype=x.dtype)
    gate, up = project(gate_up, x, norm).chunk(2, dim=-1)
    return F.silu(gate) * up


def gemv(
    layer: Any,
    x: Tensor,
    norm: RMSNorm | None,
    *,
    dtype: torch.dtype,
    silu: bool = False,
    gated: bool = False,
    residual: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    scales = (layer.input_scale, layer.weight_scale) if isinstance(layer, Fp8Linear) else (None, None)
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    y: Tensor = torch.ops.jet.gemv(
        x, layer.weight, *scales, layer.bias, weight, residual, y_scale, eps, silu, gated, dtype
    )
    return y
