"""A JetBlock between its projections with gradients, for training: jet_block.py's equations on packed sequences.

Saved for the backward pass are the inputs alone, 2 (2HK + 6D + 2H) bytes a token in bf16 (W = 4), 41 KB for jet-2b's
layer; everything else is recomputed (jet_block_backward.py; what a GPU holds meanwhile: gated_delta_rule_backward.py).
An opaque op with registered gradients: torch.compile keeps its graph whole and torch.utils.checkpoint works. No
gradient of a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jet_export.kernels import jet_block_backward as passes
from jet_export.kernels.common import acc_dtype
from jet_export.kernels.dynamic_conv_backward import dynamic_conv_train
from jet_export.kernels.gated_delta_rule_torch import in_plain_torch
from jet_export.kernels.gated_delta_rule_train import check_bounds, gated_delta_rule_train
from jet_export.kernels.jet_block_backward import Block, Dims
from jet_export.utils.errors import JetExportError

__all__ = ["dynamic_conv_train", "gated_delta_rule_train", "jet_block_train"]


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
    block = Block(qkuz, ba, kappa, A_log, dt_bias, w_o, cu_seqlens, initial_state, dims, norm_eps)
    if not in_plain_torch(qkuz):
        return passes.forward_triton(block)
    check_bounds(cu_seqlens, len(qkuz), "jet_block_train")
    return passes.forward_torch(block)


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
    block = Block(qkuz, ba, kappa, A_log, dt_bias, w_o, cu_seqlens, initial_state, dims, norm_eps)
    backward = passes.backward_torch if in_plain_torch(qkuz) else passes.backward_triton
    return backward(block, dout, d_final)


@jet_block_backward.register_fake
def _(
    qkuz, ba, kappa, A_log, dt_bias, w_o, cu_seqlens, initial_state, num_heads, head_k_dim, head_v_dim, norm_eps, dout,
    d_final,
):  # fmt: skip
    state = 0 if initial_state is None else initial_state.shape
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
    state = (num_heads, head_k_dim, head_v_dim)
    wanted = {
        "qkuz": (qkuz.shape[1] >= dims.width, f"[T, {dims.width} or more]"),
        "ba": (ba.shape == (T, 2 * num_heads), f"[T, {2 * num_heads}]"),
        "kappa": (kappa.shape[0] == T and kappa.shape[1] % dims.D == 0, f"[T, a multiple of {dims.D}]"),
        "w_o": (w_o.shape == (head_v_dim,), f"[{head_v_dim}]"),
        # N stays out of the text: torch.compile would trace again for every number of sequences
        "initial_state": (
            initial_state is None or initial_state.shape == (N, *state),
            f"[N, {', '.join(map(str, state))}]",
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
