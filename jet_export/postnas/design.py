"""Step 3's variants of the JetBlock. Each differs from it in one choice, and runs on the JetBlock's own op:
convolutions of q and k come before it, static taps are constant ones, an absent gate is one whose SiLU is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jet_export.kernels.jet_block_train import jet_block_train
from jet_export.postnas.mixer import Mixer, Sizes, own_precision, short_conv
from jet_export.training.data.rows import Batch

OPEN = 1.2784645427610738  # its SiLU is 1


@dataclass(frozen=True)
class Design:
    """The JetBlock's choices."""

    conv_qk: bool = False  # static convolutions of q and k
    conv_v: str = "dynamic"  # static, none
    taps: int = 0  # 0: the student's
    reduction: int = 0  # D / generator width; 0: the student's
    gate: bool = True


JET = Design()
DESIGNS: dict[str, Design] = {
    "jet": JET,
    "static q, k; dynamic v": replace(JET, conv_qk=True),
    "static q, k, v": replace(JET, conv_qk=True, conv_v="static"),
    "static v": replace(JET, conv_v="static"),
    "no convolution": replace(JET, conv_v="none"),
    "2 taps": replace(JET, taps=2),
    "3 taps": replace(JET, taps=3),
    "6 taps": replace(JET, taps=6),
    "generator D/2": replace(JET, reduction=2),
    "generator D/4": replace(JET, reduction=4),
    "generator D/16": replace(JET, reduction=16),
    "generator D/32": replace(JET, reduction=32),
    "no gate": replace(JET, gate=False),
}
VARIANTS = tuple(DESIGNS)


class DesignedBlock(Mixer):
    def __init__(self, s: Sizes, design: Design) -> None:
        super().__init__()
        (H, K, V), D = s.dims, s.dims.value_dim
        self.sizes, self.dims, self.design = s, s.dims, design
        self.taps = design.taps or s.conv_size
        self.in_proj = nn.Linear(s.hidden, 2 * H * K + D + (D if design.gate else 0), bias=False)
        self.ba_proj = nn.Linear(s.hidden, 2 * H, bias=False)
        if design.conv_qk:
            self.qk = _Conv(2 * H * K, self.taps)
        if design.conv_v == "static":
            self.v = _Conv(D, self.taps)
        elif design.conv_v == "dynamic":
            R = max(1, D // (design.reduction or s.reduction))
            self.w1, self.w2 = nn.Linear(s.hidden, R, bias=False), nn.Linear(R, D * self.taps, bias=False)
            self.v = _Conv(D, self.taps)  # the generator's bias
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H))
        self.o_norm = nn.Parameter(torch.ones(V))
        self.o_proj = nn.Linear(D, s.hidden, bias=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        (H, K, V), D = self.dims, self.dims.value_dim
        q_k, rest = self.in_proj(x).tensor_split([2 * H * K], 1)
        if self.design.conv_qk:
            q_k = short_conv(q_k, self.qk.conv, batch)
        parts = [q_k, rest] if self.design.gate else [q_k, rest, torch.full_like(rest, OPEN)]
        qkuz = torch.cat(parts, 1)
        args = (
            qkuz, self.ba_proj(x), self.kappa(x).to(qkuz.dtype), self.A_log, self.dt_bias, self.o_norm.to(qkuz.dtype),
        )  # fmt: skip
        with own_precision(x):
            o = jet_block_train(*args, batch.cu_seqlens, H, K, V, self.sizes.norm_eps)
        assert isinstance(o, Tensor) and o.shape[1] == D
        out: Tensor = self.o_proj(o)
        return out

    def kappa(self, x: Tensor) -> Tensor:
        """[T, D * taps], the taps of v."""
        D = self.dims.value_dim
        if self.design.conv_v == "none":
            one = F.one_hot(torch.tensor(self.taps - 1, device=x.device), self.taps).to(x.dtype)
            return one.expand(len(x), D, self.taps).reshape(len(x), -1)
        static = self.v.conv.flatten().expand(len(x), -1)
        if self.design.conv_v == "static":
            return static
        out: Tensor = self.w2(F.silu(self.w1(x))) + static
        return out


class _Conv(nn.Module):
    """The taps [D, W] of a static convolution."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.zeros(width, taps))
