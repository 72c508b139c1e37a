"""Chunked prefill of the gated delta rule: equations in gated_delta_rule.py, BT tokens a chunk, two kernels.

`chunk_prepare_kernel`, parallel over (head, chunk), computes everything that needs neither the state nor v. It stores
the scan's operands, indexed by token and in the model dtype: kn, q_in = exp(G) qn, solve = (I + A)^-1 diag(beta) and
attn = tril((qn kn^T) exp(G_i - G_j)); and in fp32, contiguous for each chunk, -exp(G), exp(G_last - G) and exp(G_last).
With RAW it computes beta and g from their projections, and with SILU it applies SiLU to q and k.

`chunk_scan_kernel`, parallel over (V tile, head, sequence), steps through the chunks with state^T [BV, K] in registers:

    v_new = solve (v - exp(G) kn state);    o = q_in state + attn v_new
    state = exp(G_last) state + (exp(G_last - G) kn)^T v_new

The decays of kn's rows are applied to operands that are in registers. Everything is computed transposed, so that the
state and v_new are left operands of the matrix products, which tensor cores can read from registers. With MIXED both
kernels leave out the sequences of one token, which are the decode kernel's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import (
    INTERPRETED,
    dot_precision,
    find_chunk,
    longer_sequences,
    num_chunks,
    sequence_bounds,
    silu,
    slot_of,
    softplus,
    wrap,
)
from jet_export.kernels.configs import lookup


@triton.jit
def unit_lower_inverse(b_A, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [BT, BT] in fp32, doubling the block size at each level.

    With X the inverse of the diagonal blocks and L the lower left quarter of each block of twice the size, the inverse
    of those is X - X L X: exact, because L X L = 0. PRECISION "fp16": products of fp16 numbers, which have the 11 bits
    of tf32, summed in fp32. They suffice where A_ij = beta_i k_i^T k_j, decays aside: for j < m < i, X_ij is
    -beta_i k_i^T prod_m (I - beta_m k_m k_m^T) k_j, within [-1, 1] for keys no longer than 1 and beta in [0, 1]."""
    o_i, o_j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    b_X = tl.where(o_i == o_j, 1.0, 0.0) - tl.where((o_i // 2 == o_j // 2) & (o_i > o_j), b_A, 0.0)
    for level in tl.static_range(1, 7):
        if 2**level < BT:
            half_i, half_j = o_i // 2**level, o_j // 2**level
            b_L = tl.where((half_i // 2 == half_j // 2) & (half_i > half_j), b_A, 0.0)
            if PRECISION == "fp16":
                b_Xh = b_X.to(tl.float16)
                b_LX = tl.dot(b_L.to(tl.float16), b_Xh).to(tl.float16)
                b_X -= tl.dot(b_Xh, b_LX)
            else:
                b_LX = tl.dot(b_L, b_X, input_precision=PRECISION)
                b_X -= tl.dot(b_X, b_LX, input_precision=PRECISION)
    return b_X


@triton.jit
def quick_silu(x):
    """silu of 16-bit numbers, in fp32 within 2^-21: half of the instructions, which bound `chunk_prepare_kernel`."""
    if INTERPRETED:
        return silu(x)
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        mul.f32 $0, $1, e;
        }""",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def l2_normalise(b_x, SILU: tl.constexpr):
    """x / sqrt(sum(x^2) + 1e-6) of rows [R, BK], fp32; of silu(x) with SILU."""
    if not SILU:
        b_x = b_x.to(tl.float32)
    elif b_x.dtype == tl.float32:
        b_x = silu(b_x)
    else:
        b_x = quick_silu(b_x.to(tl.float32))
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) + 1e-6)[:, None]


@triton.jit
def gates(p_b, p_g, stride_b, stride_g, A_log, dt_bias, i_h, o_t, m_t, dtype: tl.constexpr, RAW: tl.constexpr):
    """beta and g of the tokens o_t; with RAW, p_b and p_g point to the projections b and a."""
    b_beta = tl.load(p_b + o_t * stride_b, mask=m_t, other=0.0).to(tl.float32)
    b_g = tl.load(p_g + o_t * stride_g, mask=m_t, other=0.0).to(tl.float32)
    if RAW:
        b_beta = tl.sigmoid(b_beta).to(dtype).to(tl.float32)
        b_g = -tl.exp(tl.load(A_log + i_h).to(tl.float32)) * softplus(b_g + tl.load(dt_bias + i_h).to(tl.float32))
    return tl.where(m_t, b_beta, 0.0), tl.where(m_t, b_g, 0.0)


@triton.jit(do_not_specialize=["N", "T"])
def chunk_prepare_kernel(
    q, k, beta, g, A_log, dt_bias, q_in, k_n, solve, attn, decays, keep, cu_seqlens, slots, N, T,
    stride_q, stride_k, stride_b, stride_g, OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_G: tl.constexpr,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (H, chunks). OFF_*: the first column of q, k, g (a) in the rows of their tensors. HK: heads of q and k."""
    i_h = tl.program_id(0)
    i_hk = i_h // (H // HK)
    i_c = tl.program_id(1)
    i_n, bos, eos, i_t = find_chunk(cu_seqlens, i_c, N, T, BT)
    if (i_t < bos) | (i_t >= eos) | (tl.load(slots + i_n) < 0) | (MIXED and eos - bos == 1):
        return
    dtype: tl.constexpr = q_in.dtype.element_ty
    row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = i_t + o_t < eos
    o_k = tl.arange(0, BK)
    m_k = m_t[:, None] & (o_k < K)[None, :]
    p_k = k + row * stride_k + OFF_K + i_hk * K + o_t[:, None] * stride_k + o_k[None, :]
    p_q = q + row * stride_q + OFF_Q + i_hk * K + o_t[:, None] * stride_q + o_k[None, :]
    b_kn = tl.load(p_k, mask=m_k, other=0.0)
    b_qn = tl.load(p_q, mask=m_k, other=0.0)
    b_beta, b_g = gates(
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, stride_b, stride_g, A_log, dt_bias, i_h,
        o_t, m_t, dtype, RAW,
    )  # fmt: skip
    b_G = tl.cumsum(b_g, 0)
    b_Glast = tl.sum(b_g, 0)
    i_chunk = i_c.to(tl.int64) * H + i_h
    tl.store(keep + i_chunk, tl.exp(b_Glast))
    tl.store(decays + i_chunk * (2 * BT) + o_t, -tl.exp(b_G))
    tl.store(decays + i_chunk * (2 * BT) + BT + o_t, tl.exp(b_Glast - b_G))

    o_out = row * (H * K) + i_h * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_k = l2_normalise(b_kn, SILU).to(dtype)
    tl.store(k_n + o_out, b_k, mask=m_k)
    b_qn = l2_normalise(b_qn, SILU) * (K**-0.5)
    tl.store(q_in + o_out, (b_qn * tl.exp(b_G)[:, None]).to(dtype), mask=m_k)
    b_q = b_qn.to(dtype)

    o_i, o_j = o_t[:, None], o_t[None, :]
    o_tt = row * (H * BT) + i_h * BT + o_i * (H * BT) + o_j
    b_decay = tl.where(o_i >= o_j, tl.exp(b_G[:, None] - b_G[None, :]), 0.0)
    b_attn = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_decay
    tl.store(attn + o_tt, b_attn.to(dtype), mask=m_t[:, None])
    b_A = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_decay * b_beta[:, None]
    b_solve = unit_lower_inverse(tl.where(o_i > o_j, b_A, 0.0), BT, INVERSE) * b_beta[None, :]
    tl.store(solve + o_tt, b_solve.to(dtype), mask=m_t[:, None])


@triton.jit
def load_tile(p, o_r, o_c, stride, n_r, n_c, MASK_R: tl.constexpr, MASK_C: tl.constexpr):
    """Rows o_r and columns o_c of a tile, zero beyond n_r rows and n_c columns."""
    p += o_r[:, None] * stride + o_c[None, :]
    if MASK_R and MASK_C:
        return tl.load(p, mask=(o_r < n_r)[:, None] & (o_c < n_c)[None, :], other=0.0)
    elif MASK_R:
        return tl.load(p, mask=(o_r < n_r)[:, None], other=0.0)
    elif MASK_C:
        return tl.load(p, mask=(o_c < n_c)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def scan_chunk(
    b_state, q_in, k_n, solve, attn, p_decays, p_keep, p_v, stride_v, p_o, row, n_t, n_v,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Store o of one chunk and return state^T [BV, BK] after it. The chunk has n_t tokens: BT unless TAIL.

    row: token * H + head."""
    dtype: tl.constexpr = q_in.dtype.element_ty
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    b_solve = load_tile(solve + row * BT, o_t, o_t, H * BT, n_t, BT, TAIL, False)
    b_v = load_tile(p_v, o_t, o_v, stride_v, n_t, n_v, TAIL, V % BV != 0)
    b_q = load_tile(q_in + row * K, o_t, o_k, H * K, n_t, K, TAIL, K != BK)
    b_k = load_tile(k_n + row * K, o_t, o_k, H * K, n_t, K, TAIL, K != BK)
    b_a = load_tile(attn + row * BT, o_t, o_t, H * BT, n_t, BT, TAIL, False)
    b_in = tl.load(p_decays + o_t)[None, :]
    b_out = tl.load(p_decays + BT + o_t)[None, :]
    b_keep = tl.load(p_keep)
    b_state_mma = b_state.to(dtype)
    b_kn_state = tl.dot(b_state_mma, tl.trans(b_k), input_precision=PRECISION)  # [BV, BT]
    b_vn = tl.dot(tl.trans(b_v), tl.trans(b_solve), input_precision=PRECISION)
    b_vn = tl.dot((b_kn_state * b_in).to(dtype), tl.trans(b_solve), acc=b_vn, input_precision=PRECISION)
    b_o = tl.dot(b_state_mma, tl.trans(b_q), input_precision=PRECISION)
    b_state = tl.dot((b_vn * b_out).to(dtype), b_k, acc=b_state * b_keep, input_precision=PRECISION)
    b_o = tl.dot(b_vn.to(dtype), tl.trans(b_a), acc=b_o, input_precision=PRECISION)
    p_o += o_t[None, :] * (H * V) + o_v[:, None]
    if TAIL or V % BV != 0:
        tl.store(p_o, b_o.to(dtype), mask=(o_t < n_t)[None, :] & (o_v < n_v)[:, None])
    else:
        tl.store(p_o, b_o.to(dtype))
    return b_state


@triton.jit(do_not_specialize=["T", "S"])
def chunk_scan_kernel(
    q_in, k_n, solve, attn, decays, keep, v, o, recurrent_state, cu_seqlens, slots, context_lens, T, S, stride_v,
    OFF_V: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, MIN_HEADS: tl.constexpr,
    MAX_HEADS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (V tiles, H, N). The o of a padding row is zero. The kernel returns at once for a batch of fewer than
    MIN_HEADS or more than MAX_HEADS heads (of all its sequences together); 0: no bound."""
    i_v = tl.program_id(0) * BV
    i_h = tl.program_id(1)
    i_n = tl.program_id(2)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    if MIXED:  # noqa: SIM102  one is a constant, the other a run-time value
        if eos - bos == 1:
            return
    if MIN_HEADS > 0 or MAX_HEADS > 0:
        sequences = tl.num_programs(2)
        if MIXED:
            sequences = longer_sequences(cu_seqlens, sequences)
        if sequences * H < MIN_HEADS:
            return
        if MAX_HEADS > 0:  # noqa: SIM102
            if sequences * H > MAX_HEADS:
                return
    slot = slot_of(slots, i_n, S)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_v = i_v + o_v < V
    p_o = o + i_h * V + i_v
    if slot < 0:
        p_o += bos.to(tl.int64) * (H * V)
        for i_t in range(0, eos - bos):
            tl.store(p_o + i_t * (H * V) + o_v, tl.zeros([BV], o.dtype.element_ty), mask=m_v)
        return
    held = tl.load(context_lens + i_n) > 0
    m_s = m_v[:, None] & (o_k < K)[None, :]
    p_state = recurrent_state + (slot * H + i_h) * (K * V) + o_k[None, :] * V + (i_v + o_v)[:, None]
    b_state = tl.load(p_state, mask=m_s & held, other=0.0).to(tl.float32)  # [BV, BK] = state^T
    i_chunk = (bos // BT + i_n).to(tl.int64) * H + i_h
    p_keep, p_decays = keep + i_chunk, decays + i_chunk * (2 * BT)
    p_v = v + OFF_V + i_h * V + i_v
    full = (eos - bos) // BT
    for i_c in tl.range(0, full, num_stages=STAGES):
        i_t = (bos + i_c * BT).to(tl.int64)
        b_state = scan_chunk(
            b_state, q_in, k_n, solve, attn, p_decays + i_c * (H * 2 * BT), p_keep + i_c * H, p_v + i_t * stride_v,
            stride_v, p_o + i_t * (H * V), i_t * H + i_h, BT, V - i_v, H, K, V, BT, BK, BV, PRECISION, False,
        )  # fmt: skip
    i_t = (bos + full * BT).to(tl.int64)
    if i_t < eos:
        b_state = scan_chunk(
            b_state, q_in, k_n, solve, attn, p_decays + full * (H * 2 * BT), p_keep + full * H, p_v + i_t * stride_v,
            stride_v, p_o + i_t * (H * V), i_t * H + i_h, eos - i_t, V - i_v, H, K, V, BT, BK, BV, PRECISION, True,
        )  # fmt: skip
    tl.store(p_state, b_state.to(recurrent_state.dtype.element_ty), mask=m_s)


def chunk_config(dtype: torch.dtype, head_k_dim: int, head_v_dim: int) -> tuple[dict, list[dict]]:
    """Block sizes and launch options of the prepare kernel, and of each form of the scan, from the table (configs.py).

    The scan runs one program for each tile of V. If the batch has few heads (of all sequences together), narrow tiles
    fill the GPU; if it has many, wide tiles read kn, q_in and solve less often. The number of heads is known only when
    a graph runs, so where the table has two forms both are launched, and one of them returns at once. The narrow form
    serves the batches whose programs all run at the same time (`one_wave`)."""
    facts = {"dtype": dtype, "head_k_dim": head_k_dim}
    prepare = lookup("delta_rule_prepare", **facts)
    blocks = {"BT": prepare["BT"], "BK": max(16, triton.next_power_of_2(head_k_dim))}
    narrow, wide = (lookup("delta_rule_scan", **facts, many_heads=many) for many in (False, True))
    one_wave, _ = narrow.pop("one_wave"), wide.pop("one_wave")
    if narrow == wide:
        return {**blocks, **prepare}, [{**blocks, **narrow, "MIN_HEADS": 0, "MAX_HEADS": 0}]
    limit = max(1, one_wave // triton.cdiv(head_v_dim, narrow["BV"]))
    return {**blocks, **prepare}, [
        {**blocks, **narrow, "MIN_HEADS": 0, "MAX_HEADS": limit},
        {**blocks, **wide, "MIN_HEADS": limit + 1, "MAX_HEADS": 0},
    ]


def chunk_delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    recurrent_state: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    head_dims: tuple[int, int, int],
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    raw_gates: tuple[Tensor, Tensor] | None = None,
    mixed: bool = False,
    key_heads: int = 0,
    silu: bool = False,
) -> Tensor:
    """o [T, H, V] in q's dtype; recurrent_state is updated in place.

    `head_dims`: H, K, V; `offsets`: the first column of q, k, v, g in the rows of their tensors; `key_heads`: those of
    q and k, if not H. A block passes raw_gates = (A_log, dt_bias): beta and g are then the projections b and a. `silu`:
    q and k are taken before SiLU. `mixed`: sequences of one token are left out; their rows of o hold anything."""
    T, N = q.shape[0], slots.shape[0]
    H, K, V = head_dims
    prepare, scans = chunk_config(q.dtype, K, V)
    BT, precision = prepare["BT"], dot_precision(q.dtype)
    inverse = "ieee" if precision == "ieee" else "fp16"
    A_log, dt_bias = raw_gates or (g, g)
    off_q, off_k, off_v, off_g = offsets
    chunks = num_chunks(T, N, BT)
    q_in, k_n = (q.new_empty(T, H, K) for _ in range(2))
    solve, attn = (q.new_empty(T, H, BT) for _ in range(2))
    decays = q.new_empty(chunks, H, 2 * BT, dtype=torch.float32)
    keep = q.new_empty(chunks, H, dtype=torch.float32)
    o = q.new_empty(T, H, V)
    wrap(chunk_prepare_kernel)[(H, chunks)](
        q, k, beta, g, A_log, dt_bias, q_in, k_n, solve, attn, decays, keep, cu_seqlens, slots, N, T,
        q.stride(0), k.stride(0), beta.stride(0), g.stride(0), OFF_Q=off_q, OFF_K=off_k, OFF_G=off_g,
        H=H, HK=key_heads or H, K=K, RAW=raw_gates is not None, SILU=silu, PRECISION=precision, INVERSE=inverse,
        MIXED=mixed, **prepare,
    )  # fmt: skip
    for scan in scans:
        wrap(chunk_scan_kernel)[(triton.cdiv(V, scan["BV"]), H, N)](
            q_in, k_n, solve, attn, decays, keep, v, o, recurrent_state, cu_seqlens, slots, context_lens,
            T, recurrent_state.shape[0], v.stride(0), OFF_V=off_v, H=H, K=K, V=V, PRECISION=precision, MIXED=mixed,
            **scan,
        )  # fmt: skip
    return o
