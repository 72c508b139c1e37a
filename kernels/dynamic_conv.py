"""Dynamic convolution: a causal depthwise convolution whose taps are computed for every token and channel.

    y[t, d] = sum_w kappa[t, d, w] * u[t - (W-1) + w, d]        w = W-1 is the current token
    v = silu(y)

u [T, D] packed tokens, kappa [T, D*W] read as [T, D, W]. A static convolution is the case of one kernel for all tokens:
kappa [D*W], read as [D, W] (conv1d.weight [D, 1, W], flat). Tokens before the call come from `conv_state` [S, rows, D],
which is updated in place. With W-1 rows it holds the last W-1 raw u of each sequence, oldest first. With more, R, it is
a ring: the u of position p lies in row p % R, so that the last R - (W-1) tokens can be taken back by a smaller
context_lens in the next call. Accumulation in fp32, one rounding.
Source: Jet-Nemotron, arXiv 2508.15884, section 3.3 (JetBlock); static: Gated DeltaNet, arXiv 2412.06464.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import (
    acc_dtype,
    by_rows,
    find_chunk,
    gather_state,
    num_chunks,
    rows,
    scatter_state,
    sequence_bounds,
    sequence_of_token,
    silu,
    slot_of,
    wrap,
    zero_padding,
)
from jet_export.kernels.configs import lookup
from jet_export.kernels.triton_op import triton_op


def dynamic_conv_ref(
    u: Tensor,  # [T, D]
    kappa: Tensor,  # [T, D*W], or [D*W] for all tokens
    conv_state: Tensor,  # [S, W-1 or more, D], updated in place
    cu_seqlens: Tensor,  # [N+1]
    slots: Tensor,  # [N]
    context_lens: Tensor,  # [N]
) -> Tensor:  # [T, D], not yet rounded: fp32 (fp64 for fp64 inputs)
    """The specification, in plain torch."""
    T, D = u.shape
    W, R = kappa.shape[-1] // D, conv_state.shape[1]
    acc = acc_dtype(u.dtype)
    u_acc, taps = u.to(acc), kappa.to(acc).view(-1, D, W)  # taps [T or 1, D, W]
    history = gather_state(conv_state, slots, context_lens, acc)  # [N, R, D]
    if R > W - 1:
        before = context_lens.long()[:, None] - torch.arange(W - 1, 0, -1, device=u.device)  # [N, W-1] positions
        history = history.gather(1, (before % R)[..., None].expand(-1, -1, D))
        history = torch.where((before >= 0)[..., None], history, torch.zeros_like(history))
    i_n = sequence_of_token(cu_seqlens, T)
    t = torch.arange(T, device=u.device)
    position = t - cu_seqlens.long()[i_n]

    def at(i_n: Tensor, t: Tensor, position: Tensor) -> Tensor:
        """Raw u at a position of a sequence; negative positions are the history."""
        past = history[i_n, (W - 1 + position).clamp(0, W - 2)]
        return torch.where((position >= 0)[:, None], u_acc[t.clamp(min=0)], past)

    y = torch.zeros_like(u_acc)
    for w in range(W):
        back = W - 1 - w
        y = y + taps[:, :, w] * at(i_n, t - back, position - back)
    v = zero_padding(by_rows(torch.nn.functional.silu, y), cu_seqlens, slots)

    rows = torch.arange(slots.shape[0], device=u.device)
    ends, lens = cu_seqlens[1:].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    if R > W - 1:
        kept = ((ends[i_n] - t <= R) & (slots >= 0)[i_n]).nonzero()[:, 0]
        row = (context_lens.long()[i_n] + position)[kept] % R
        conv_state[slots.long()[i_n[kept]], row] = u[kept].to(conv_state.dtype)
        return v
    last = [at(rows, ends - back, lens - back) for back in range(W - 1, 0, -1)]
    scatter_state(conv_state, slots, torch.stack(last, 1))
    return v


@triton.jit
def load_back(p_u, stride_u, o_t, m_t, o_d, m_d, i_position, back: tl.constexpr):
    """Raw u, `back` tokens before each token of a tile, [BT, BD] fp32; zero before the call."""
    m = (m_t & (i_position + o_t >= back))[:, None] & m_d[None, :]
    return tl.load(p_u + (o_t - back)[:, None] * stride_u + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_held(
    p_state, o_t, m_t, o_d, m_d, i_position, context, back: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """As `load_back`, from conv_state: the tokens before the call, of which there are `context`; zero inside it."""
    o_p = i_position + o_t - back  # relative to the call's first token
    m_p = m_t & (o_p < 0) & (context > 0)
    o_row = W - 1 + o_p
    if ROWS > W - 1:
        m_p &= context + o_p >= 0
        o_row = tl.where(m_p, context + o_p, 0) % ROWS
    m = m_p[:, None] & m_d[None, :]
    return tl.load(p_state + o_row[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def conv_tile(
    p_u, stride_u, p_kappa, stride_kappa, p_state, o_t, m_t, i_d, n_d, i_position, context,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """v = silu(y) for channels i_d + [0, BD) of n_d, [BT, BD] fp32. Pointers are to the tile's first token and the
    head's first channel; i_position: that token's position in the call; context: the tokens before the call.
    FIRST: the tile is a single token, the first of the call, so that only conv_state precedes it."""
    BT: tl.constexpr = o_t.shape[0]
    o_d = i_d + tl.arange(0, BD)
    m_d = o_d < n_d
    if W == 4:  # one contiguous load of all taps, split in registers; all loads before the first use
        o_dw = i_d * W + tl.arange(0, BD * W)
        m_dw = m_t[:, None] & (o_dw < n_d * W)[None, :]
        b_kappa = tl.load(p_kappa + o_t[:, None] * stride_kappa + o_dw[None, :], mask=m_dw, other=0.0)
        b_u0 = load_back(p_u, stride_u, o_t, m_t, o_d, m_d, i_position, 0)
        if not FIRST:
            b_u1 = load_back(p_u, stride_u, o_t, m_t, o_d, m_d, i_position, 1)
            b_u2 = load_back(p_u, stride_u, o_t, m_t, o_d, m_d, i_position, 2)
            b_u3 = load_back(p_u, stride_u, o_t, m_t, o_d, m_d, i_position, 3)
        b_even, b_odd = tl.split(tl.reshape(b_kappa.to(tl.float32), [BT, BD, 2, 2]))
        b_k0, b_k2 = tl.split(b_even)
        b_k1, b_k3 = tl.split(b_odd)
        b_y = b_k3 * b_u0
        if not FIRST:
            b_y += b_k2 * b_u1 + b_k1 * b_u2 + b_k0 * b_u3
        if i_position < W - 1:
            b_y += b_k2 * load_held(p_state, o_t, m_t, o_d, m_d, i_position, context, 1, D, W, ROWS)
            b_y += b_k1 * load_held(p_state, o_t, m_t, o_d, m_d, i_position, context, 2, D, W, ROWS)
            b_y += b_k0 * load_held(p_state, o_t, m_t, o_d, m_d, i_position, context, 3, D, W, ROWS)
    else:
        b_y = tl.zeros([BT, BD], tl.float32)
        m = m_t[:, None] & m_d[None, :]
        for w in tl.static_range(W):
            p_tap = p_kappa + o_t[:, None] * stride_kappa + o_d[None, :] * W + w
            b_u = load_back(p_u, stride_u, o_t, m_t, o_d, m_d, i_position, W - 1 - w)
            if i_position < W - 1:
                b_u += load_held(p_state, o_t, m_t, o_d, m_d, i_position, context, W - 1 - w, D, W, ROWS)
            b_y += tl.load(p_tap, mask=m, other=0.0).to(tl.float32) * b_u
    return silu(b_y)


@triton.jit
def conv_four(b_k0, b_k1, b_k2, b_k3, b_u0, b_u1, b_u2, b_u3):
    """Four taps in `conv_tile`'s order of sums; b_u3 is the oldest token."""
    return b_k3 * b_u0 + (b_k2 * b_u1 + b_k1 * b_u2 + b_k0 * b_u3)


@triton.jit
def held_row(p_state, o_d, m_d, context, back: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Raw u [BD], `back` tokens before the call's first, in fp32; zero before the sequence."""
    row = 3 - back
    held = context > 0
    if ROWS > 3:
        held = context >= back
        row = tl.where(held, context - back, 0) % ROWS
    return tl.load(p_state + row * D + o_d, mask=m_d & held, other=0.0).to(tl.float32)


@triton.jit
def static_conv_walk(
    p_u, stride_u, p_kappa, p_state, p_v, n_tokens, i_d, i_position, context, used,
    D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`conv_tile`, to the bit, and its store, for n_tokens tokens that share four taps. These and the last three tokens
    stay in registers, so that u is read once; u of four tokens is loaded before any store, which no load may pass.
    used: the sequence has a slot, else context is 0; i_position is 0 or at least 3."""
    dtype: tl.constexpr = p_v.dtype.element_ty
    o_d = i_d + tl.arange(0, BD)
    m_d = o_d < D
    o_dw = i_d * 4 + tl.arange(0, BD * 4)
    b_kappa = tl.load(p_kappa + o_dw, mask=o_dw < D * 4, other=0.0)
    b_even, b_odd = tl.split(tl.reshape(b_kappa.to(tl.float32), [BD, 2, 2]))
    b_k0, b_k2 = tl.split(b_even)
    b_k1, b_k3 = tl.split(b_odd)
    m_u = m_d & used
    m_back = m_u & (i_position > 0)
    b_a = tl.load(p_u - 3 * stride_u + o_d, mask=m_back, other=0.0).to(tl.float32)
    b_b = tl.load(p_u - 2 * stride_u + o_d, mask=m_back, other=0.0).to(tl.float32)
    b_c = tl.load(p_u - stride_u + o_d, mask=m_back, other=0.0).to(tl.float32)
    for i in range(0, n_tokens, 4):
        p_i = p_u + i * stride_u + o_d
        b_0 = tl.load(p_i, mask=m_u, other=0.0).to(tl.float32)
        b_1 = tl.load(p_i + stride_u, mask=m_u & (i + 1 < n_tokens), other=0.0).to(tl.float32)
        b_2 = tl.load(p_i + 2 * stride_u, mask=m_u & (i + 2 < n_tokens), other=0.0).to(tl.float32)
        b_3 = tl.load(p_i + 3 * stride_u, mask=m_u & (i + 3 < n_tokens), other=0.0).to(tl.float32)
        b_y0 = conv_four(b_k0, b_k1, b_k2, b_k3, b_0, b_c, b_b, b_a)
        b_y1 = conv_four(b_k0, b_k1, b_k2, b_k3, b_1, b_0, b_c, b_b)
        b_y2 = conv_four(b_k0, b_k1, b_k2, b_k3, b_2, b_1, b_0, b_c)
        b_y3 = conv_four(b_k0, b_k1, b_k2, b_k3, b_3, b_2, b_1, b_0)
        p_o = p_v + i * D + o_d
        tl.store(p_o, silu(b_y0).to(dtype), mask=m_d)
        tl.store(p_o + D, silu(b_y1).to(dtype), mask=m_d & (i + 1 < n_tokens))
        tl.store(p_o + 2 * D, silu(b_y2).to(dtype), mask=m_d & (i + 2 < n_tokens))
        tl.store(p_o + 3 * D, silu(b_y3).to(dtype), mask=m_d & (i + 3 < n_tokens))
        b_a, b_b, b_c = b_1, b_2, b_3
    # Once more the tokens that the state reaches: a branch inside the loop would delay a load.
    if (i_position == 0) & (context > 0):
        tl.debug_barrier()  # stores to the same addresses, whichever thread's, come after those above
        b_z = tl.zeros([BD], tl.float32)
        b_h1 = held_row(p_state, o_d, m_d, context, 1, D, ROWS)
        b_h2 = held_row(p_state, o_d, m_d, context, 2, D, ROWS)
        b_h3 = held_row(p_state, o_d, m_d, context, 3, D, ROWS)
        b_0 = tl.load(p_u + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_1 = tl.load(p_u + stride_u + o_d, mask=m_d & (n_tokens > 1), other=0.0).to(tl.float32)
        b_2 = tl.load(p_u + 2 * stride_u + o_d, mask=m_d & (n_tokens > 2), other=0.0).to(tl.float32)
        b_y0 = conv_four(b_k0, b_k1, b_k2, b_k3, b_0, b_z, b_z, b_z) + b_k2 * b_h1
        b_y0 += b_k1 * b_h2
        b_y0 += b_k0 * b_h3
        b_y1 = conv_four(b_k0, b_k1, b_k2, b_k3, b_1, b_0, b_z, b_z) + b_k1 * b_h1
        b_y1 += b_k0 * b_h2
        b_y2 = conv_four(b_k0, b_k1, b_k2, b_k3, b_2, b_1, b_0, b_z) + b_k0 * b_h1
        tl.store(p_v + o_d, silu(b_y0).to(dtype), mask=m_d)
        tl.store(p_v + D + o_d, silu(b_y1).to(dtype), mask=m_d & (n_tokens > 1))
        tl.store(p_v + 2 * D + o_d, silu(b_y2).to(dtype), mask=m_d & (n_tokens > 2))


@triton.jit
def shift_conv_state(p_state, p_end, stride_u, n_tokens, o_d, m_d, held, D: tl.constexpr, W: tl.constexpr):
    """Set conv_state to the last W-1 raw u of the old state followed by n_tokens new ones.

    p_end: one past the last token. Oldest row first, so that each row is read before it is written. The convolution
    must already have read the old state."""
    for j in tl.static_range(W - 1):
        is_new = n_tokens >= W - 1 - j
        b_new = tl.load(p_end - (W - 1 - j) * stride_u + o_d, mask=m_d & is_new, other=0.0)
        b_old = tl.load(p_state + (j + n_tokens) * D + o_d, mask=m_d & held & (n_tokens < W - 1 - j), other=0.0)
        tl.store(p_state + j * D + o_d, tl.where(is_new, b_new, b_old.to(b_new.dtype)), mask=m_d)


@triton.jit
def store_ring(p_state, b_u, o_t, m_t, o_d, m_d, context, D: tl.constexpr, ROWS: tl.constexpr):
    """Raw u [BT, BD] of the call's tokens o_t into a ring. The convolution must already have read the old rows."""
    o_row = tl.maximum(context + o_t, 0) % ROWS
    tl.store(p_state + o_row[:, None] * D + o_d[None, :], b_u, mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["N", "T", "S"])
def dynamic_conv_kernel(
    u, kappa, v, conv_state, cu_seqlens, slots, context_lens, N, T, S, stride_u, stride_kappa,
    OFF_U: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    MIXED: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, chunks). MIXED: sequences of one token are left out. STATIC: one kernel of four taps for all
    tokens."""
    i_d = tl.program_id(0) * BD
    i_n, bos, eos, i_t = find_chunk(cu_seqlens, tl.program_id(1), N, T, BT)
    if (i_t < bos) | (i_t >= eos) | (MIXED and eos - bos == 1):
        return
    slot = slot_of(slots, i_n, S)
    context = tl.where(slot >= 0, tl.load(context_lens + i_n), 0)
    row = i_t.to(tl.int64)
    if STATIC:
        static_conv_walk(
            u + row * stride_u + OFF_U, stride_u, kappa, conv_state + slot * ROWS * D, v + row * D,
            tl.minimum(eos - i_t, BT), i_d, i_t - bos, context, slot >= 0, D, ROWS, BD,
        )  # fmt: skip
    else:
        o_t = tl.arange(0, BT)
        m_t = i_t + o_t < eos
        b_v = conv_tile(
            u + row * stride_u + OFF_U, stride_u, kappa + row * stride_kappa, stride_kappa,
            conv_state + slot * ROWS * D, o_t, m_t & (slot >= 0), i_d, D, i_t - bos, context, D, W, ROWS, BD, False,
        )  # fmt: skip
        o_d = i_d + tl.arange(0, BD)
        m = m_t[:, None] & (o_d < D)[None, :]
        tl.store(v + row * D + o_t[:, None] * D + o_d[None, :], b_v.to(v.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T", "S"])
def conv_state_kernel(
    u, conv_state, cu_seqlens, slots, context_lens, T, S, stride_u,
    OFF_U: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, N). Writes the new conv_state, after `dynamic_conv_kernel` has read the old one."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    i_n = tl.program_id(1)
    slot = slot_of(slots, i_n, S)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    if (slot < 0) | (MIXED and eos - bos == 1):
        return
    context = tl.load(context_lens + i_n)
    p_state = conv_state + slot * ROWS * D
    if ROWS > W - 1:
        o_t = eos - bos - 1 - tl.arange(0, BR)  # the last ROWS tokens of the call
        m_t = (tl.arange(0, BR) < ROWS) & (o_t >= 0)
        p_u = u + (bos + o_t).to(tl.int64)[:, None] * stride_u + OFF_U + o_d[None, :]
        b_u = tl.load(p_u, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        store_ring(p_state, b_u, o_t, m_t, o_d, o_d < D, context, D, ROWS)
    else:
        p_end = u + eos.to(tl.int64) * stride_u + OFF_U
        shift_conv_state(p_state, p_end, stride_u, eos - bos, o_d, o_d < D, context > 0, D, W)


@triton.jit(do_not_specialize=["T", "S"])
def conv_rows_kernel(
    u, kappa, v, conv_state, cu_seqlens, slots, context_lens, T, S, stride_u, stride_kappa,
    OFF_U: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, N). Both kernels in one, for sequences of at most BT tokens: channels are independent, so
    the program that has read a sequence's conv_state writes it."""
    i_d = tl.program_id(0) * BD
    i_n = tl.program_id(1)
    slot = slot_of(slots, i_n, S)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    context = tl.where(slot >= 0, tl.load(context_lens + i_n), 0)
    row = bos.to(tl.int64)
    o_t, o_d = tl.arange(0, BT), i_d + tl.arange(0, BD)
    m_t, m_d = o_t < eos - bos, o_d < D
    p_u, p_state = u + row * stride_u + OFF_U, conv_state + slot * ROWS * D
    b_v = conv_tile(
        p_u, stride_u, kappa + row * stride_kappa, stride_kappa, p_state, o_t, m_t & (slot >= 0), i_d, D, 0, context,
        D, W, ROWS, BD, BT == 1,
    )  # fmt: skip
    m = m_t[:, None] & m_d[None, :]
    tl.store(v + row * D + o_t[:, None] * D + o_d[None, :], b_v.to(v.dtype.element_ty), mask=m)
    if slot >= 0:
        tl.debug_barrier()  # every thread has read the old conv_state
        if ROWS > W - 1:
            b_u = tl.load(p_u + o_t[:, None] * stride_u + o_d[None, :], mask=m, other=0.0)
            store_ring(p_state, b_u, o_t, m_t, o_d, m_d, context, D, ROWS)
        else:
            p_end = p_u + (eos - bos) * stride_u
            shift_conv_state(p_state, p_end, stride_u, eos - bos, o_d, m_d, context > 0, D, W)


def dynamic_conv_triton(
    u: Tensor,
    kappa: Tensor,
    conv_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    off_u: int = 0,
    mixed: bool = False,
    most: int = 0,
) -> Tensor:
    """Launches the kernels; arguments as `dynamic_conv_ref`, rows of u and kappa contiguous.

    off_u: u's first column in the rows of its tensor; `mixed`: sequences of one token are left out; `most`: no sequence
    has more tokens, and a ring has W-1 rows beside theirs, so that one launch does; 0: not known."""
    T, N, (S, R, D) = u.shape[0], slots.shape[0], conv_state.shape
    W, stride_kappa = kappa.shape[-1] // D, 0 if len(kappa.shape) == 1 else kappa.stride(0)
    v = u.new_empty(T, D)
    tail = (cu_seqlens, slots, context_lens)
    if most:
        BT, BD = triton.next_power_of_2(most), 256 if most == 1 else 64
        wrap(conv_rows_kernel)[(triton.cdiv(D, BD), N)](
            u, kappa, v, conv_state, *tail, T, S, u.stride(0), stride_kappa,
            OFF_U=off_u, D=D, W=W, ROWS=R, BT=BT, BD=BD,
        )  # fmt: skip
        return v
    static = W == 4 and stride_kappa == 0
    use = lookup("dynamic_conv", dtype=u.dtype, conv_size=W, static=static)
    BT, BD = use["BT"], use["BD"]
    wrap(dynamic_conv_kernel)[(triton.cdiv(D, BD), num_chunks(T, N, BT))](
        u, kappa, v, conv_state, *tail, N, T, S, u.stride(0), stride_kappa,
        OFF_U=off_u, D=D, W=W, ROWS=R, BT=BT, BD=BD, MIXED=mixed, STATIC=static, num_warps=use["num_warps"],
    )  # fmt: skip
    BD = 256 if R == W - 1 else 64  # a ring's rows are stored together
    wrap(conv_state_kernel)[(triton.cdiv(D, BD), N)](
        u, conv_state, *tail, T, S, u.stride(0),
        OFF_U=off_u, D=D, W=W, ROWS=R, BR=triton.next_power_of_2(R), BD=BD, MIXED=mixed,
    )  # fmt: skip
    return v


@torch.library.custom_op("jet::dynamic_conv_cpu", mutates_args={"conv_state"})
def dynamic_conv_cpu(
    u: Tensor, kappa: Tensor, conv_state: Tensor, cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor
) -> Tensor:
    return dynamic_conv_ref(u, kappa, conv_state, cu_seqlens, slots, context_lens).to(u.dtype)


@dynamic_conv_cpu.register_fake
def _(u, kappa, conv_state, cu_seqlens, slots, context_lens):
    return u.new_empty(u.shape)


@triton_op("jet::dynamic_conv", mutates_args={"conv_state"})
def dynamic_conv(
    u: Tensor, kappa: Tensor, conv_state: Tensor, cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor
) -> Tensor:
    """v [T, D] = silu(dynamic convolution of u); conv_state is updated in place. See the module's equations."""
    if u.device.type == "cpu":
        return torch.ops.jet.dynamic_conv_cpu(u, kappa, conv_state, cu_seqlens, slots, context_lens)
    u, kappa = rows(u), rows(kappa)
    return dynamic_conv_triton(u, kappa, conv_state, cu_seqlens, slots, context_lens)
