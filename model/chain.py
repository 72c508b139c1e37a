"""The layers of one token that jet::linear_chain runs in one launch: what a mixer leaves to do, the MLP, and the next
mixer's projections. Until the last of them is known nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jet_export.kernels import linear_chain as _linear_chain  # noqa: F401  registers jet::linear_chain
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.rms_norm import RMSNorm


@dataclass
class Chain:
    """residual + out(x), and once `mlp` is known the MLP's sum on top; `total` [1, hidden] once it has run."""

    x: Tensor  # [1, K], the mixer's output
    residual: Tensor  # [1, hidden]
    out: nn.Module
    barrier: Tensor  # [1] int32, zero; afterwards the next chain's
    mlp: tuple[RMSNorm, nn.Module, nn.Module] | None = None  # the norm, gate_up_proj, down_proj
    total: Tensor | None = None

    def run(self, norm: RMSNorm, layers: tuple[nn.Module, ...]) -> Linked:
        """Launch it, with the layers that follow the norm: one, one of few outputs, and one on SiLU of the last outputs
        of the first."""
        assert self.mlp is not None
        mlp_norm, gate_up, down = self.mlp
        every = (self.out, gate_up, down, *layers)
        fp8 = [layer if isinstance(layer, Fp8Linear) else None for layer in every]
        x_scales = [None if layer is None else layer.input_scale for layer in fp8]
        w_scales = [None if layer is None else layer.weight_scale for layer in fp8]
        self.total, *products, self.barrier = torch.ops.jet.linear_chain(
            self.x, self.residual, [layer.weight for layer in every], x_scales, w_scales,
            [layer.bias for layer in every], [mlp_norm.weight, norm.weight], self.barrier, norm.eps,
        )  # fmt: skip
        return Linked(dict(zip(layers, products, strict=False)))


@dataclass
class Linked:
    """Stands for a normed input whose layers have run: their outputs [1, N]."""

    products: dict[nn.Module, Tensor]
