"""Both passes of a JetBlock in training, in plain torch and as launches of the kernels; jet_block_train.py is the op.

The gradients are those of dynamic_conv_backward.py, gated_delta_rule_torch.py and gated_rms_norm_backward.py, and of
the gates beta = sigmoid(b) and g = -exp(A_log) softplus(a + dt_bias), which plain torch computes on a GPU too:

    db = dbeta beta (1 - beta);   da = -dg exp(A_log) sigmoid(a + dt_bias);   ddt_bias = sum_t da;   dA_log = sum_t dg g
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.common import acc_dtype, rows
from jet_export.kernels.dynamic_conv_backward import (
    dynamic_conv_backward_torch,
    dynamic_conv_backward_triton,
    dynamic_conv_forward_torch,
    dynamic_conv_forward_triton,
)
from jet_export.kernels.gated_delta_rule_backward import Inputs, delta_rule_backward_triton
from jet_export.kernels.gated_delta_rule_torch import Rule, delta_rule_backward, delta_rule_forward
from jet_export.kernels.gated_delta_rule_train_chunk import Operands, Scanned, prepare, scan
from jet_export.kernels.gated_rms_norm import gated_rms_norm_triton
from jet_export.kernels.gated_rms_norm_backward import (
    gated_rms_norm_backward_torch,
    gated_rms_norm_backward_triton,
    gated_rms_norm_forward_torch,
)


@dataclass(frozen=True)
class Dims:
    """Heads, and where q, k, u and the output gate lie in a row of qkuz."""

    H: int
    K: int
    V: int

    @property
    def D(self) -> int:
        return self.H * self.V

    @property
    def width(self) -> int:
        return 2 * self.H * self.K + 2 * self.D

    def split(self, qkuz: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [T, H, K], u [T, D], gate [T, H, V]: views."""
        hk = self.H * self.K
        q, k, u, gate = qkuz[:, : self.width].split([hk, hk, self.D, self.D], -1)
        return q.unflatten(-1, (self.H, -1)), k.unflatten(-1, (self.H, -1)), u, gate.unflatten(-1, (self.H, -1))


@dataclass(frozen=True)
class Block:
    """The op's inputs."""

    qkuz: Tensor  # [T, >= 2HK + 2D]
    ba: Tensor  # [T, 2H]
    kappa: Tensor  # [T, D*W]
    A_log: Tensor  # [H]
    dt_bias: Tensor  # [H]
    w_o: Tensor  # [V]
    cu_seqlens: Tensor  # [N+1]
    initial_state: Tensor | None  # [N, H, K, V]
    dims: Dims
    norm_eps: float

    def gates(self) -> tuple[Tensor, Tensor]:
        """beta in ba's dtype and g in fp32 (fp64 for fp64 inputs), [T, H]."""
        acc = acc_dtype(self.ba.dtype)
        b, a = self.ba.to(acc).chunk(2, -1)
        return b.sigmoid().to(self.ba.dtype), -self.A_log.to(acc).exp() * F.softplus(a + self.dt_bias.to(acc))

    def gates_backward(self, dbeta: Tensor, dg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dba [T, 2H], dA_log [H], ddt_bias [H] in fp32 (fp64)."""
        acc = acc_dtype(self.ba.dtype)
        b, a = self.ba.to(acc).chunk(2, -1)
        beta, a, rate = b.sigmoid(), a + self.dt_bias.to(acc), -self.A_log.to(acc).exp()
        da = dg * rate * a.sigmoid()
        return torch.cat([dbeta * beta * (1 - beta), da], -1), (dg * rate * F.softplus(a)).sum(0), da.sum(0)

    def results(
        self, dqkuz: Tensor, dkappa: Tensor, dw_o: Tensor, dbeta: Tensor, dg: Tensor, d_initial: Tensor
    ) -> Gradients:
        dba, dA_log, ddt_bias = self.gates_backward(dbeta, dg)
        small = (dba, self.ba), (dkappa, self.kappa), (dA_log, self.A_log), (ddt_bias, self.dt_bias), (dw_o, self.w_o)
        dba, dkappa, dA_log, ddt_bias, dw_o = (x.to(like.dtype).contiguous() for x, like in small)
        return dqkuz, dba, dkappa, dA_log, ddt_bias, dw_o, d_initial


# of qkuz, ba, kappa, A_log, dt_bias, w_o in their dtypes, and of initial_state in fp32 (fp64), empty without one
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def rule_torch(x: Block) -> Rule:
    q, k, u, _ = x.dims.split(x.qkuz)
    v = dynamic_conv_forward_torch(u, x.kappa, x.cu_seqlens).unflatten(-1, (x.dims.H, -1))
    return delta_rule_forward(q, k, v, *x.gates(), x.cu_seqlens, x.initial_state, silu=True)


def forward_torch(x: Block) -> tuple[Tensor, Tensor]:
    """out [T, D] in qkuz's dtype, final_state [N, H, K, V] in fp32 (fp64)."""
    rule = rule_torch(x)
    out = gated_rms_norm_forward_torch(rule.o, x.w_o, x.dims.split(x.qkuz)[3], x.norm_eps)
    return out.flatten(1).to(x.qkuz.dtype).contiguous(), rule.final_state


def backward_torch(x: Block, dout: Tensor, d_final: Tensor | None) -> Gradients:
    rule = rule_torch(x)
    q, k, u, gate = x.dims.split(x.qkuz)
    do, dw_o, dgate = gated_rms_norm_backward_torch(rule.o, x.w_o, gate, x.norm_eps, dout.view_as(rule.o))
    d = delta_rule_backward(rule, q, k, do, d_final, silu=True)
    du, dkappa = dynamic_conv_backward_torch(u, x.kappa, x.cu_seqlens, d.v.flatten(1))
    dqkuz = torch.zeros_like(x.qkuz, memory_format=torch.contiguous_format)
    for to, part in zip(x.dims.split(dqkuz), (d.q, d.k, du, dgate), strict=True):
        to.copy_(part)
    d_initial = d.initial_state if x.initial_state is not None else d.initial_state.new_empty(0)
    return x.results(dqkuz, dkappa, dw_o, d.beta, d.g, d_initial)


def rule_triton(x: Block, keep: bool) -> tuple[Operands, Tensor, Scanned]:
    """Operands, v [T, H, V], and what the forward scan stores: o, and with `keep` what the backward pass needs."""
    q, k, u, _ = x.dims.split(rows(x.qkuz))
    v = dynamic_conv_forward_triton(u, rows(x.kappa), x.cu_seqlens).unflatten(-1, (x.dims.H, -1))
    operands = prepare(q, k, *x.gates(), x.cu_seqlens, x.dims.V, l2=True, silu=True, keep=keep)
    return operands, v, scan(operands, v, x.cu_seqlens, x.initial_state, output=True, keep=keep)


def forward_triton(x: Block) -> tuple[Tensor, Tensor]:
    """Launches the kernels; as `forward_torch`."""
    _, _, scanned = rule_triton(x, keep=False)
    out = gated_rms_norm_triton(scanned.o, x.w_o, x.dims.split(rows(x.qkuz))[3], x.norm_eps)
    return out.flatten(1), scanned.final_state


def backward_triton(x: Block, dout: Tensor, d_final: Tensor | None) -> Gradients:
    """Launches the kernels; as `backward_torch`. Nothing is kept from the forward pass."""
    operands, v, scanned = rule_triton(x, keep=True)
    qkuz, kappa = rows(x.qkuz), rows(x.kappa)
    q, k, u, gate = x.dims.split(qkuz)
    dqkuz = qkuz.new_empty(qkuz.shape)
    dqkuz[:, x.dims.width :].zero_()
    dq, dk, du, dgate = x.dims.split(dqkuz)
    dout = dout.contiguous().view_as(scanned.o)
    do, dw_o = gated_rms_norm_backward_triton(scanned.o, x.w_o, gate, x.norm_eps, dout, dgate)
    inputs = Inputs(q, k, v, x.cu_seqlens, l2=True, silu=True)
    needs_initial = x.initial_state is not None
    dv, dbeta, dg, d_initial = delta_rule_backward_triton(inputs, operands, scanned, do, d_final, dq, dk, needs_initial)
    dkappa = dynamic_conv_backward_triton(u, kappa, x.cu_seqlens, dv.flatten(1), du)
    return x.results(dqkuz, dkappa, dw_o, dbeta, dg, d_initial)
