"""Dynamic convolution of packed sequences with gradients (equations of the forward pass: dynamic_conv.py).

    v = silu(y);   dy = dv silu'(y)
    dkappa[t, d, w] = dy[t, d] u[t - (W-1) + w, d];   du[s, d] = sum_b kappa[s+b, d, W-1-b] dy[s+b, d]

over the tokens of a sequence; b counts tokens back. There is no carried state: every sequence starts afresh. Saved for
the backward pass: the inputs u and kappa. y is recomputed.
"""

import torch
from torch import Tensor

from jet_export.kernels.common import acc_dtype, sequence_of_token
from jet_export.kernels.gated_delta_rule_torch import silu_gradient


def position_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: each packed token's position in its sequence."""
    i_n = sequence_of_token(cu_seqlens, num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - cu_seqlens.long()[i_n]


def tokens_back(x: Tensor, position: Tensor, back: int) -> Tensor:
    """[T, D]: x of `back` tokens before, zero before the start of the sequence."""
    if back == 0:
        return x
    shifted = torch.zeros_like(x)
    shifted[back:] = x[:-back]
    return shifted * (position >= back)[:, None]


def conv_before_silu(
    u: Tensor,  # [T, D]
    kappa: Tensor,  # [T, D, W]
    position: Tensor,  # [T]
) -> Tensor:  # [T, D]
    W = kappa.shape[2]
    y = kappa[:, :, W - 1] * u
    for back in range(1, W):
        y = y + kappa[:, :, W - 1 - back] * tokens_back(u, position, back)
    return y


def dynamic_conv_forward_torch(u: Tensor, kappa: Tensor, cu_seqlens: Tensor) -> Tensor:
    """v [T, D] in fp32 (fp64 for fp64 inputs)."""
    acc, (T, D) = acc_dtype(u.dtype), u.shape
    taps = kappa.to(acc).view(T, D, -1)
    return torch.nn.functional.silu(conv_before_silu(u.to(acc), taps, position_of_token(cu_seqlens, T)))


def dynamic_conv_backward_torch(u: Tensor, kappa: Tensor, cu_seqlens: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """du [T, D] and dkappa [T, D*W] in fp32 (fp64 for fp64 inputs)."""
    acc, (T, D) = acc_dtype(u.dtype), u.shape
    u, taps, position = u.to(acc), kappa.to(acc).view(T, D, -1), position_of_token(cu_seqlens, T)
    W = taps.shape[2]
    dy = silu_gradient(conv_before_silu(u, taps, position), dv.to(acc))
    dkappa, du = torch.empty_like(taps), dy * taps[:, :, W - 1]
    dkappa[:, :, W - 1] = dy * u
    for back in range(1, min(W, T)):
        dkappa[:, :, W - 1 - back] = dy * tokens_back(u, position, back)
        du[:-back] += (dy * taps[:, :, W - 1 - back] * (position >= back)[:, None])[back:]
    dkappa[:, :, : max(0, W - T)] = 0
    return du, dkappa.view(T, -1)


@torch.library.custom_op("jet::dynamic_conv_train", mutates_args=())
def dynamic_conv_train(u: Tensor, kappa: Tensor, cu_seqlens: Tensor) -> Tensor:
    """v [T, D] in u's dtype, of u [T, D], kappa [T, D*W] and cu_seqlens [N+1] int32; differentiable in u and kappa."""
    return dynamic_conv_forward_torch(u, kappa, cu_seqlens).to(u.dtype)


@dynamic_conv_train.register_fake
def _(u, kappa, cu_seqlens):
    return u.new_empty(u.shape)


@torch.library.custom_op("jet::dynamic_conv_backward", mutates_args=())
def dynamic_conv_backward(u: Tensor, kappa: Tensor, cu_seqlens: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    du, dkappa = dynamic_conv_backward_torch(u, kappa, cu_seqlens, dv)
    return du.to(u.dtype), dkappa.to(kappa.dtype)


@dynamic_conv_backward.register_fake
def _(u, kappa, cu_seqlens, dv):
    return u.new_empty(u.shape), kappa.new_empty(kappa.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dv):
    return *dynamic_conv_backward(*ctx.saved_tensors, dv), None


dynamic_conv_train.register_autograd(_backward, setup_context=_save)
