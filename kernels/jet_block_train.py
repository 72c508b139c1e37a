"""A JetBlock between its projections with gradients, for training: jet_block.py's equations on packed sequences.

The gradients are those of dynamic_conv_backward.py, gated_delta_rule_torch.py and gated_rms_norm_backward.py, and of
the gates beta = sigmoid(b) and g = -exp(A_log) softplus(a + dt_bias):

    db = dbeta beta (1 - beta);   da = -dg exp(A_log) sigmoid(a + dt_bias);   ddt_bias = sum_t da;   dA_log = sum_t dg g

Saved for the backward pass are the inputs alone, 2 (2HK + 6D + 2H) bytes a token in bf16 (W = 4), 39 KB for jet-2b's
layer; everything else is recomputed. An opaque op with registered gradients: torch.compile keeps its graph whole and
torch.utils.checkpoint works. No gradient of a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.common import acc_dtype
from jet_export.kernels.dynamic_conv_backward import (
    dynamic_conv_backward_torch,
    dynamic_conv_forward_torch,
    dynamic_conv_train,
)
from jet_export.kernels.gated_delta_rule_torch import Rule, delta_rule_backward, delta_rule_forward
from jet_export.kernels.gated_delta_rule_train import check_bounds, gated_delta_rule_train
from jet_export.kernels.gated_rms_norm_backward import gated_rms_norm_backward_torch, gated_rms_norm_forward_torch
from jet_export.utils.errors import JetExportError

__all__ = ["dynamic_conv_train", "gated_delta_rule_train", "jet_block_train"]


@dataclass(frozen=True)
class Dims:
    """Heads and where q, k, u and the output gate lie in a row of qkuz."""

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
        return q.unflatten(-1, (self.H, self.K)), k.unflatten(-1, (self.H, self.K)), u, gate.unflatten(-1, (self.H, -1))


def gates(ba: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """beta in ba's dtype and g in fp32 (fp64 for fp64 inputs), [T, H]."""
    acc = acc_dtype(ba.dtype)
    b, a = ba.to(acc).chunk(2, -1)
    return b.sigmoid().to(ba.dtype), -A_log.to(acc).exp() * F.softplus(a + dt_bias.to(acc))


def gates_backward(
    ba: Tensor, A_log: Tensor, dt_bias: Tensor, dbeta: Tensor, dg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dba [T, 2H], dA_log [H], ddt_bias [H] in fp32 (fp64)."""
    acc = acc_dtype(ba.dtype)
    b, a = ba.to(acc).chunk(2, -1)
    beta, a, rate = b.sigmoid(), a + dt_bias.to(acc), -A_log.to(acc).exp()
    da = dg * rate * a.sigmoid()
    return torch.cat([dbeta * beta * (1 - beta), da], -1), (dg * rate * F.softplus(a)).sum(0), da.sum(0)


def rule_torch(
    qkuz: Tensor,
    ba: Tensor,
    kappa: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    dims: Dims,
) -> Rule:
    q, k, u, _ = dims.split(qkuz)
    v = dynamic_conv_forward_torch(u, kappa, cu_seqlens).unflatten(-1, (dims.H, dims.V))
    beta, g = gates(ba, A_log, dt_bias)
    return delta_rule_forward(q, k, v, beta, g, cu_seqlens, initial_state, silu=True)


@torch.library.custom_op("jet::jet_block_train", mutates_args=())
def jet_block_op(
    qkuz: Tensor,
    ba: Tensor,
    kappa: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    w_o: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    dims = Dims(num_heads, head_k_dim, head_v_dim)
    check_bounds(cu_seqlens, len(qkuz), "jet_block_train")
    rule = rule_torch(qkuz, ba, kappa, A_log, dt_bias, cu_seqlens, initial_state, dims)
    out = gated_rms_norm_forward_torch(rule.o, w_o, dims.split(qkuz)[3], norm_eps)
    return out.flatten(1).to(qkuz.dtype), rule.final_state


@jet_block_op.register_fake
def _(qkuz, ba, kappa, A_log, dt_bias, w_o, cu_seqlens, initial_state, num_heads, head_k_dim, head_v_dim, norm_eps):
    state = (cu_seqlens.shape[0] - 1, num_heads, head_k_dim, head_v_dim)
    return qkuz.new_empty(qkuz.shape[0], num_heads * head_v_dim), qkuz.new_empty(state, dtype=acc_dtype(qkuz.dtype))


@torch.library.custom_op("jet::jet_block_backward", mutates_args=())
def jet_block_backward(
    qkuz: Tensor,
    ba: Tensor,
    kappa: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    w_o: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
    dout: Tensor,
    d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dims = Dims(num_heads, head_k_dim, head_v_dim)
    rule = rule_torch(qkuz, ba, kappa, A_log, dt_bias, cu_seqlens, initial_state, dims)
    q, k, u, gate = dims.split(qkuz)
    do, dw_o, dgate = gated_rms_norm_backward_torch(rule.o, w_o, gate, norm_eps, dout.view_as(rule.o))
    d = delta_rule_backward(rule, q, k, do, d_final, silu=True)
    du, dkappa = dynamic_conv_backward_torch(u, kappa, cu_seqlens, d.v.flatten(1))
    dba, dA_log, ddt_bias = gates_backward(ba, A_log, dt_bias, d.beta, d.g)
    dqkuz = torch.zeros_like(qkuz, memory_format=torch.contiguous_format)
    for to, x in zip(dims.split(dqkuz), (d.q, d.k, du, dgate), strict=True):
        to.copy_(x)
    grads = (dba, ba), (dkappa, kappa), (dA_log, A_log), (ddt_bias, dt_bias), (dw_o, w_o)
    return dqkuz, *(x.to(like.dtype).contiguous() for x, like in grads), d.initial_state


@jet_block_backward.register_fake
def _(
    qkuz, ba, kappa, A_log, dt_bias, w_o, cu_seqlens, initial_state, num_heads, head_k_dim, head_v_dim, norm_eps, dout,
    d_final,
):  # fmt: skip
    state = (cu_seqlens.shape[0] - 1, num_heads, head_k_dim, head_v_dim)
    grads = (x.new_empty(x.shape) for x in (qkuz, ba, kappa, A_log, dt_bias, w_o))
    return *grads, qkuz.new_empty(state, dtype=acc_dtype(qkuz.dtype))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.sizes = inputs[8:]


def _backward(ctx, dout, d_final):
    saved = ctx.saved_tensors  # once: under checkpointing each access would be a recomputation
    *grads, d_initial = jet_block_backward(*saved, *ctx.sizes, dout, d_final)
    d_initial = None if saved[7] is None else d_initial.to(saved[7].dtype)
    return *grads, None, d_initial, None, None, None, None


jet_block_op.register_autograd(_backward, setup_context=_save)


def jet_block_train(
    qkuz: Tensor,  # [T, >= 2HK + 2D]: q | k | u | gate | ignored columns, whose gradient is zero
    ba: Tensor,  # [T, 2H]: b | a
    kappa: Tensor,  # [T, D*W]
    A_log: Tensor,  # [H]
    dt_bias: Tensor,  # [H]
    w_o: Tensor,  # [V]
    cu_seqlens: Tensor,  # [N+1] int32, from 0 to T
    num_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    norm_eps: float,
    *,
    initial_state: Tensor | None = None,  # [N, H, K, V]; None: zero
    return_final: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [T, D] in qkuz's dtype; with return_final also final_state [N, H, K, V] fp32
    """Differentiable in every floating-point input. The convolution starts afresh with each sequence.

    Raises JetExportError for shapes that do not fit the heads."""
    dims, T, N = Dims(num_heads, head_k_dim, head_v_dim), qkuz.shape[0], cu_seqlens.shape[0] - 1
    wanted = {
        "qkuz": (qkuz.shape[1] >= dims.width, f"[T, {dims.width} or more]"),
        "ba": (ba.shape == (T, 2 * num_heads), f"[T, {2 * num_heads}]"),
        "kappa": (kappa.shape[0] == T and kappa.shape[1] % dims.D == 0, f"[T, a multiple of {dims.D}]"),
        "w_o": (w_o.shape == (head_v_dim,), f"[{head_v_dim}]"),
        "initial_state": (
            initial_state is None or initial_state.shape == (N, num_heads, head_k_dim, head_v_dim),
            f"[{N}, {num_heads}, {head_k_dim}, {head_v_dim}]",
        ),
    }
    for name, (fits, shape) in wanted.items():
        if not fits:
            raise JetExportError(
                f"jet_block_train: {name} does not fit {num_heads} heads of K {head_k_dim} and V {head_v_dim}.",
                f"It is {shape}, T = {T} tokens.",
            )
    out, final = jet_block_op(
        qkuz, ba, kappa, A_log, dt_bias, w_o, cu_seqlens, initial_state, num_heads, head_k_dim, head_v_dim, norm_eps
    )
    return (out, final) if return_final else out
