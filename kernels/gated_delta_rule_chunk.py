"""Chunked prefill of the gated delta rule: equations in gated_delta_rule.py, BT tokens a chunk, two kernels.

`chunk_prepare_kernel`, parallel over (head, chunk), does everything that needs no state and leaves, token-indexed and
in the model dtype, what the scan multiplies with: q_in = exp(G) qn, k_out = exp(G_last - G) kn, w, u, and
attn = tril((qn kn^T) exp(G_i - G_j)); and exp(G_last) a chunk in fp32. With W > 0 its inputs are a JetBlock's raw
projections: it then applies SiLU to q and k, computes beta and g, and v by the dynamic convolution.

`chunk_scan_kernel`, parallel over (V tile, head, sequence), walks the chunks with S^T [BV, K] in registers. S is kept
transposed so that it and v_new^T are left operands of the matrix products, which tensor cores take from registers.
It overwrites u with o, and with W > 0 brings conv_state up to date, after the first kernel has read it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import dot_precision, find_chunk, num_chunks, silu, softplus, wrap
from jet_export.kernels.dynamic_conv import conv_tile, shift_conv_state


@triton.jit
def unit_lower_inverse(b_A, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [BT, BT] in fp32.

    Forward substitution in the 16 x 16 blocks on the diagonal, all at once; then blocks twice the size from
    (D + M)^-1 = X - X M X, X = D^-1, exact because M, which leads from the first half to the second, has M X M = 0."""
    NB: tl.constexpr = BT // 16
    o_b = tl.arange(0, NB)
    o_i = tl.arange(0, 16)
    m_diag = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_L = tl.sum(tl.where(m_diag, tl.reshape(b_A, [NB, 16, NB, 16]), 0.0), 2)  # [NB, 16, 16]
    b_X = tl.where((o_i[:, None] == o_i[None, :])[None, :, :], 1.0, 0.0) + tl.zeros([NB, 16, 16], tl.float32)
    for i in range(1, 16):
        m_i = (o_i == i)[None, :, None]
        b_row = tl.sum(tl.where(m_i, b_L, 0.0), 1)  # [NB, 16]: L[i, :]
        b_sub = tl.sum(b_row[:, :, None] * b_X, 1)  # [NB, 16]: L[i, :] X
        b_X = tl.where(m_i, b_X - b_sub[:, None, :], b_X)
    b_X = tl.reshape(tl.where(m_diag, b_X[:, :, None, :], 0.0), [BT, BT])
    o_t = tl.arange(0, BT)
    for level in tl.static_range(4, 7):
        if 2**level < BT:
            half_i, half_j = (o_t // 2**level)[:, None], (o_t // 2**level)[None, :]
            b_M = tl.where((half_i // 2 == half_j // 2) & (half_i > half_j), b_A, 0.0)
            b_MX = tl.dot(b_M, b_X, input_precision=PRECISION)
            b_X -= tl.dot(b_X, b_MX, input_precision=PRECISION)
    return b_X


@triton.jit
def load_normed(p, stride, o_t, m_t, K: tl.constexpr, BK: tl.constexpr, SILU: tl.constexpr):
    """x / sqrt(sum(x^2) + 1e-6) of rows [BT, BK], fp32; of silu(x) with SILU."""
    o_k = tl.arange(0, BK)
    m = m_t[:, None] & (o_k < K)[None, :]
    b_x = tl.load(p + o_t[:, None] * stride + o_k[None, :], mask=m, other=0.0).to(tl.float32)
    if SILU:
        b_x = silu(b_x)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) + 1e-6)[:, None]


@triton.jit
def gates(p_b, p_g, stride_b, stride_g, A_log, dt_bias, i_h, o_t, m_t, dtype: tl.constexpr, RAW: tl.constexpr):
    """beta and g of the tokens o_t; RAW: p_b, p_g hold the projections b and a."""
    b_beta = tl.load(p_b + o_t * stride_b, mask=m_t, other=0.0).to(tl.float32)
    b_g = tl.load(p_g + o_t * stride_g, mask=m_t, other=0.0).to(tl.float32)
    if RAW:
        b_beta = tl.sigmoid(b_beta).to(dtype).to(tl.float32)
        b_g = -tl.exp(tl.load(A_log + i_h).to(tl.float32)) * softplus(b_g + tl.load(dt_bias + i_h).to(tl.float32))
    return tl.where(m_t, b_beta, 0.0), tl.where(m_t, b_g, 0.0)


@triton.jit(do_not_specialize=["N"])
def chunk_prepare_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, q_in, k_out, w, u, attn, keep,
    cu_seqlens, slots, context_lens, N, stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (H, chunks). OFF_*: columns of q, k, v (u), g (a) in their rows."""
    i_h = tl.program_id(0)
    i_c = tl.program_id(1)
    i_n, bos, eos, i_t = find_chunk(cu_seqlens, i_c, N, BT)
    if i_t >= eos:
        return
    slot = tl.load(slots + i_n).to(tl.int64)
    dtype: tl.constexpr = q_in.dtype.element_ty
    row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = i_t + o_t < eos
    p_out = u + row * (H * V) + i_h * V
    if slot < 0:  # a padding row: o is zero, and nothing else of it is looked at
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            p_zero = p_out + o_t[:, None] * (H * V) + o_v[None, :]
            tl.store(p_zero, tl.zeros([BT, BV], dtype), mask=m_t[:, None] & (o_v < V)[None, :])
        return
    o_k = tl.arange(0, BK)
    m_k = m_t[:, None] & (o_k < K)[None, :]
    o_hk = o_t[:, None] * (H * K) + o_k[None, :]
    out_k = row * (H * K) + i_h * K

    b_beta, b_g = gates(
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, stride_b, stride_g, A_log, dt_bias, i_h,
        o_t, m_t, dtype, W > 0,
    )  # fmt: skip
    b_G = tl.cumsum(b_g, 0)
    b_Glast = tl.sum(b_g, 0)
    tl.store(keep + i_c.to(tl.int64) * H + i_h, tl.exp(b_Glast))

    b_kn = load_normed(k + row * stride_k + OFF_K + i_h * K, stride_k, o_t, m_t, K, BK, W > 0)
    tl.store(k_out + out_k + o_hk, (b_kn * tl.exp(b_Glast - b_G)[:, None]).to(dtype), mask=m_k)
    b_k = b_kn.to(dtype)
    b_qn = load_normed(q + row * stride_q + OFF_Q + i_h * K, stride_q, o_t, m_t, K, BK, W > 0) * (K**-0.5)
    tl.store(q_in + out_k + o_hk, (b_qn * tl.exp(b_G)[:, None]).to(dtype), mask=m_k)
    b_q = b_qn.to(dtype)

    o_i, o_j = o_t[:, None], o_t[None, :]
    b_decay = tl.where(o_i >= o_j, tl.exp(b_G[:, None] - b_G[None, :]), 0.0)
    b_attn = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_decay
    p_attn = attn + row * (H * BT) + i_h * BT + o_t[:, None] * (H * BT) + o_j
    tl.store(p_attn, b_attn.to(dtype), mask=m_t[:, None])
    b_A = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_decay * b_beta[:, None]
    b_X = unit_lower_inverse(tl.where(o_i > o_j, b_A, 0.0), BT, PRECISION) * b_beta[None, :]

    b_w = tl.dot((b_X * tl.exp(b_G)[None, :]).to(dtype), b_k, input_precision=PRECISION)
    tl.store(w + out_k + o_hk, b_w.to(dtype), mask=m_k)
    b_T = b_X.to(dtype)
    held = tl.load(context_lens + i_n) > 0
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        p_v = v + row * stride_v + OFF_V + i_h * V
        if W > 0:
            p_kappa = kappa + row * stride_kappa + i_h * V * W
            p_state = conv_state + slot * ((W - 1) * H * V) + i_h * V
            b_v = conv_tile(
                p_v, stride_v, p_kappa, stride_kappa, p_state, o_t, m_t, i_v, V, i_t - bos, held, H * V, W, BV
            ).to(dtype)
        else:
            b_v = tl.load(p_v + o_t[:, None] * stride_v + o_v[None, :], mask=m_v, other=0.0)
        b_u = tl.dot(b_T, b_v, input_precision=PRECISION)
        tl.store(p_out + o_t[:, None] * (H * V) + o_v[None, :], b_u.to(dtype), mask=m_v)


@triton.jit
def chunk_scan_kernel(
    q_in, k_out, w, u, attn, keep, recurrent_state, raw_u, conv_state, cu_seqlens, slots, context_lens, stride_u,
    OFF_U: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (V tiles, H, N); u becomes o."""
    i_v = tl.program_id(0) * BV
    i_h = tl.program_id(1)
    i_n = tl.program_id(2)
    slot = tl.load(slots + i_n).to(tl.int64)
    if slot < 0:
        return
    bos, eos = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
    held = tl.load(context_lens + i_n) > 0
    dtype: tl.constexpr = q_in.dtype.element_ty
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v + tl.arange(0, BV)
    m_v = o_v < V
    m_s = m_v[:, None] & (o_k < K)[None, :]
    p_S = recurrent_state + (slot * H + i_h) * (K * V) + o_k[None, :] * V + o_v[:, None]
    b_S = tl.load(p_S, mask=m_s & held, other=0.0).to(tl.float32)  # [BV, BK] = S^T
    p_keep = keep + (bos // BT + i_n).to(tl.int64) * H + i_h
    o_hk = o_t[:, None] * (H * K) + o_k[None, :]
    o_hv = o_t[None, :] * (H * V) + o_v[:, None]
    o_a = o_t[:, None] * (H * BT) + o_t[None, :]

    for i_c in tl.range(0, tl.cdiv(eos - bos, BT), num_stages=STAGES):
        i_t = bos + i_c * BT
        row = i_t.to(tl.int64) * H + i_h
        m_t = i_t + o_t < eos
        m_k = m_t[:, None] & (o_k < K)[None, :]
        m_uv = m_t[None, :] & m_v[:, None]
        b_w = tl.load(w + row * K + o_hk, mask=m_k, other=0.0)  # [BT, BK]
        b_q = tl.load(q_in + row * K + o_hk, mask=m_k, other=0.0)
        b_a = tl.load(attn + row * BT + o_a, mask=m_t[:, None], other=0.0)  # [BT, BT]
        b_k = tl.load(k_out + row * K + o_hk, mask=m_k, other=0.0)
        b_u = tl.load(u + row * V + o_hv, mask=m_uv, other=0.0)  # [BV, BT]
        b_keep = tl.load(p_keep + i_c * H)
        b_Sd = b_S.to(dtype)
        b_vn = (b_u.to(tl.float32) - tl.dot(b_Sd, tl.trans(b_w), input_precision=PRECISION)).to(dtype)
        b_o = tl.dot(b_Sd, tl.trans(b_q), input_precision=PRECISION)
        b_S = tl.dot(b_vn, b_k, acc=b_S * b_keep, input_precision=PRECISION)
        b_o = tl.dot(b_vn, tl.trans(b_a), acc=b_o, input_precision=PRECISION)
        tl.store(u + row * V + o_hv, b_o.to(dtype), mask=m_uv)
    tl.store(p_S, b_S.to(recurrent_state.dtype.element_ty), mask=m_s)
    if W > 0:
        D: tl.constexpr = H * V
        p_end = raw_u + eos.to(tl.int64) * stride_u + OFF_U + i_h * V
        shift_conv_state(
            conv_state + slot * ((W - 1) * D) + i_h * V, p_end, stride_u, eos - bos, o_v, m_v, held, D, W
        )  # fmt: skip


def chunk_config(dtype: torch.dtype, head_k_dim: int) -> tuple[dict, dict]:
    """Block sizes and launch options of the two kernels."""
    BK = max(16, triton.next_power_of_2(head_k_dim))
    if dtype == torch.float32:  # IEEE products run outside the tensor cores: small blocks keep them in registers
        prepare = {"BT": 16, "BK": BK, "BV": 16, "num_warps": 4, "num_stages": 1}
        scan = {"BT": 16, "BK": BK, "BV": 16, "STAGES": 1, "num_warps": 4}
    else:
        prepare = {"BT": 64, "BK": BK, "BV": 64, "num_warps": 8 if BK > 128 else 4, "num_stages": 1}
        scan = {"BT": 64, "BK": BK, "BV": 64, "STAGES": 1 if BK > 128 else 3, "num_warps": 8 if BK > 128 else 4}
    return prepare, scan


def chunk_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, recurrent_state: Tensor,
    cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor, head_dims: tuple[int, int, int],
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    conv: tuple[Tensor, Tensor] | None = None, raw_gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """o [T, H, V] in q's dtype, padding rows not written; recurrent_state (and conv_state) in place.

    `head_dims`: H, K, V; `offsets`: first columns of q, k, v, g in the rows of the given tensors. A JetBlock gives
    conv = (kappa, conv_state) and raw_gates = (A_log, dt_bias): then q, k, v are raw q, k, u and beta, g are b, a."""
    T, N = q.shape[0], slots.shape[0]
    H, K, V = head_dims
    prepare, scan = chunk_config(q.dtype, K)
    BT, precision = prepare["BT"], dot_precision(q.dtype)
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    W = conv_state.shape[1] + 1 if conv else 0
    chunks = num_chunks(T, N, BT)
    q_in, k_out, w = (q.new_empty(T, H, K) for _ in range(3))
    u, attn = q.new_empty(T, H, V), q.new_empty(T, H, BT)
    keep = q.new_empty(chunks, H, dtype=torch.float32)
    tail = (cu_seqlens, slots, context_lens)
    off_q, off_k, off_v, off_g = offsets
    wrap(chunk_prepare_kernel)[(H, chunks)](
        q, k, v, beta, g, kappa, A_log, dt_bias, conv_state, q_in, k_out, w, u, attn, keep, *tail, N,
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0),
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, H=H, K=K, V=V, W=W, PRECISION=precision, **prepare,
    )  # fmt: skip
    wrap(chunk_scan_kernel)[(triton.cdiv(V, scan["BV"]), H, N)](
        q_in, k_out, w, u, attn, keep, recurrent_state, v, conv_state, *tail, v.stride(0),
        OFF_U=off_v, H=H, K=K, V=V, W=W, PRECISION=precision, **scan,
    )  # fmt: skip
    return u
