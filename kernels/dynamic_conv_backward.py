"""Dynamic convolution of packed sequences with gradients (equations of the forward pass: dynamic_conv.py).

    v = silu(y);   dy = dv silu'(y)
    dkappa[t, d, w] = dy[t, d] u[t - (W-1) + w, d];   du[s, d] = sum_b kappa[s+b, d, W-1-b] dy[s+b, d]

over the tokens of a sequence; b counts tokens back. There is no carried state: every sequence starts afresh. Saved for
the backward pass: the inputs u and kappa. y is recomputed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import acc_dtype, find_chunk, num_chunks, rows, sequence_of_token, silu
from jet_export.kernels.gated_delta_rule_torch import in_plain_torch, silu_gradient

TILE = {"BT": 16, "BD": 64}  # tokens and channels a program; not measured


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


@triton.jit
def load_u(p_u, stride_u, o_t, o_d, m_d, first, end):
    """u of tokens o_t and channels o_d, [BT, BD] fp32; zero outside tokens [first, end)."""
    m = ((o_t >= first) & (o_t < end))[:, None] & m_d[None, :]
    return tl.load(p_u + o_t[:, None] * stride_u + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_taps(p_kappa, stride_kappa, o_t, m_t, i_d, n_d, BD: tl.constexpr):
    """The four taps of tokens o_t and channels i_d + [0, BD) of n_d, each [BT, BD] fp32: one load, split."""
    o_dw = i_d * 4 + tl.arange(0, BD * 4)
    m = m_t[:, None] & (o_dw < n_d * 4)[None, :]
    b_kappa = tl.load(p_kappa + o_t[:, None] * stride_kappa + o_dw[None, :], mask=m, other=0.0).to(tl.float32)
    b_even, b_odd = tl.split(tl.reshape(b_kappa, [o_t.shape[0], BD, 2, 2]))
    b_k0, b_k2 = tl.split(b_even)
    b_k1, b_k3 = tl.split(b_odd)
    return b_k0, b_k1, b_k2, b_k3


@triton.jit
def load_tap(p_kappa, stride_kappa, o_t, m_t, o_d, m_d, w, W: tl.constexpr):
    """Tap w of tokens o_t and channels o_d, [BT, BD] fp32."""
    p = p_kappa + o_t[:, None] * stride_kappa + o_d[None, :] * W + w
    return tl.load(p, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def before_silu(
    p_u, stride_u, p_kappa, stride_kappa, o_t, i_d, first, end, D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr
):
    """y of tokens o_t, [BT, BD] fp32; zero from token `end` on, whose taps are not read."""
    o_d = i_d + tl.arange(0, BD)
    m_d = o_d < D
    m_t = o_t < end
    b_y = tl.zeros([o_t.shape[0], BD], tl.float32)
    if W == 4:
        b_k0, b_k1, b_k2, b_k3 = load_taps(p_kappa, stride_kappa, o_t, m_t, i_d, D, BD)
        b_y += b_k3 * load_u(p_u, stride_u, o_t, o_d, m_d, first, end)
        b_y += b_k2 * load_u(p_u, stride_u, o_t - 1, o_d, m_d, first, end)
        b_y += b_k1 * load_u(p_u, stride_u, o_t - 2, o_d, m_d, first, end)
        b_y += b_k0 * load_u(p_u, stride_u, o_t - 3, o_d, m_d, first, end)
    else:
        for w in tl.static_range(W):
            b_y += load_u(p_u, stride_u, o_t - (W - 1 - w), o_d, m_d, first, end) * load_tap(
                p_kappa, stride_kappa, o_t, m_t, o_d, m_d, w, W
            )
    return b_y


@triton.jit(do_not_specialize=["N", "T"])
def conv_train_kernel(
    u, kappa, v, cu_seqlens, N, T, stride_u, stride_kappa,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, chunks)."""
    i_d = tl.program_id(0) * BD
    _, bos, eos, i_t = find_chunk(cu_seqlens, tl.program_id(1), N, T, BT)
    if (i_t < bos) | (i_t >= eos):
        return
    row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)  # from i_t on, as first and end are
    o_d = i_d + tl.arange(0, BD)
    b_y = before_silu(
        u + row * stride_u, stride_u, kappa + row * stride_kappa, stride_kappa, o_t, i_d, bos - i_t, eos - i_t, D, W, BD
    )
    m = (o_t < eos - i_t)[:, None] & (o_d < D)[None, :]
    tl.store(v + row * D + o_t[:, None] * D + o_d[None, :], silu(b_y).to(v.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "T"])
def conv_backward_kernel(
    u, kappa, dv, du, dkappa, cu_seqlens, N, T, stride_u, stride_kappa, stride_dv, stride_du,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, chunks). dy of the W-1 tokens after the tile is computed again: nothing is exchanged."""
    i_d = tl.program_id(0) * BD
    _, bos, eos, i_t = find_chunk(cu_seqlens, tl.program_id(1), N, T, BT)
    if (i_t < bos) | (i_t >= eos):
        return
    row = i_t.to(tl.int64)
    first, end = bos - i_t, eos - i_t
    p_u, p_kappa, p_dv = u + row * stride_u, kappa + row * stride_kappa, dv + row * stride_dv
    o_t = tl.arange(0, BT)
    o_d = i_d + tl.arange(0, BD)
    m_d = o_d < D
    m_t = o_t < end
    b_du = tl.zeros([BT, BD], tl.float32)
    for ahead in tl.static_range(W):
        o_a = o_t + ahead
        m_a = o_a < end
        b_y = before_silu(p_u, stride_u, p_kappa, stride_kappa, o_a, i_d, first, end, D, W, BD)
        b_sigmoid = tl.sigmoid(b_y)
        b_dy = load_u(p_dv, stride_dv, o_a, o_d, m_d, first, end) * b_sigmoid * (1.0 + b_y * (1.0 - b_sigmoid))
        b_du += b_dy * load_tap(p_kappa, stride_kappa, o_a, m_a, o_d, m_d, W - 1 - ahead, W)
        if ahead == 0:
            p_dkappa = dkappa + row * (D * W)
            if W == 4:
                b_even = tl.join(
                    b_dy * load_u(p_u, stride_u, o_t - 3, o_d, m_d, first, end),
                    b_dy * load_u(p_u, stride_u, o_t - 1, o_d, m_d, first, end),
                )
                b_odd = tl.join(
                    b_dy * load_u(p_u, stride_u, o_t - 2, o_d, m_d, first, end),
                    b_dy * load_u(p_u, stride_u, o_t, o_d, m_d, first, end),
                )
                b_all = tl.reshape(tl.join(b_even, b_odd), [BT, BD * 4])
                o_dw = i_d * 4 + tl.arange(0, BD * 4)
                m = m_t[:, None] & (o_dw < D * 4)[None, :]
                p = p_dkappa + o_t[:, None] * (D * 4) + o_dw[None, :]
                tl.store(p, b_all.to(dkappa.dtype.element_ty), mask=m)
            else:
                for w in tl.static_range(W):
                    b_dk = b_dy * load_u(p_u, stride_u, o_t - (W - 1 - w), o_d, m_d, first, end)
                    p = p_dkappa + o_t[:, None] * (D * W) + o_d[None, :] * W + w
                    tl.store(p, b_dk.to(dkappa.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
    p = du + row * stride_du + o_t[:, None] * stride_du + o_d[None, :]
    tl.store(p, b_du.to(du.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


def dynamic_conv_forward_triton(u: Tensor, kappa: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Launches the kernel; v [T, D] in u's dtype. Rows of u and kappa are contiguous."""
    (T, D), N = u.shape, cu_seqlens.shape[0] - 1
    v = u.new_empty(T, D)
    conv_train_kernel[(triton.cdiv(D, TILE["BD"]), num_chunks(T, N, TILE["BT"]))](
        u, kappa, v, cu_seqlens, N, T, u.stride(0), kappa.stride(0), D=D, W=kappa.shape[1] // D, **TILE
    )
    return v


def dynamic_conv_backward_triton(u: Tensor, kappa: Tensor, cu_seqlens: Tensor, dv: Tensor, du: Tensor) -> Tensor:
    """Launches the kernel, which writes du [T, D]; dkappa [T, D*W]. Rows are contiguous, strides between them any."""
    (T, D), N = u.shape, cu_seqlens.shape[0] - 1
    dkappa = kappa.new_empty(kappa.shape)
    conv_backward_kernel[(triton.cdiv(D, TILE["BD"]), num_chunks(T, N, TILE["BT"]))](
        u, kappa, dv, du, dkappa, cu_seqlens, N, T, u.stride(0), kappa.stride(0), dv.stride(0), du.stride(0),
        D=D, W=kappa.shape[1] // D, **TILE,
    )  # fmt: skip
    return dkappa


@torch.library.custom_op("jet::dynamic_conv_train", mutates_args=())
def dynamic_conv_train(u: Tensor, kappa: Tensor, cu_seqlens: Tensor) -> Tensor:
    """v [T, D] in u's dtype, of u [T, D], kappa [T, D*W] and cu_seqlens [N+1] int32; differentiable in u and kappa."""
    if not in_plain_torch(u):
        return dynamic_conv_forward_triton(rows(u), rows(kappa), cu_seqlens)
    return dynamic_conv_forward_torch(u, kappa, cu_seqlens).to(u.dtype).contiguous()


@dynamic_conv_train.register_fake
def _(u, kappa, cu_seqlens):
    return u.new_empty(u.shape)


@torch.library.custom_op("jet::dynamic_conv_backward", mutates_args=())
def dynamic_conv_backward(u: Tensor, kappa: Tensor, cu_seqlens: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    if not in_plain_torch(u):
        du = u.new_empty(u.shape)
        return du, dynamic_conv_backward_triton(rows(u), rows(kappa), cu_seqlens, rows(dv), du)
    du, dkappa = dynamic_conv_backward_torch(u, kappa, cu_seqlens, dv)
    return du.to(u.dtype).contiguous(), dkappa.to(kappa.dtype).contiguous()


@dynamic_conv_backward.register_fake
def _(u, kappa, cu_seqlens, dv):
    return u.new_empty(u.shape), kappa.new_empty(kappa.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dv):
    return *dynamic_conv_backward(*ctx.saved_tensors, dv), None


dynamic_conv_train.register_autograd(_backward, setup_context=_save)
