"""The backward kernels of the gated delta rule; equations in gated_delta_rule_torch.py.

1. `reverse_scan_kernel`, parallel over (V tile, head, sequence), goes through the chunks from the last to the first
   with dS^T [BV, K] in registers. It needs no forward state. It stores dy, dv = beta dy, and dS'^T after each chunk.
2. Parallel over the chunks, `chunk_pairs_kernel` and `chunk_qk_kernel` of gated_delta_rule_backward_chunk.py: dqn, dkn
   and the parts of dbeta and dg.
3. `chunk_finish_kernel`, parallel over (head, chunk): dq and dk before their normalisation and SiLU, dbeta, dg.

No product takes a transposed accumulator: Triton 3.4 to 3.7 computes such a one wrongly on Hopper where it comes from
registers (fla#640, fla#984). Where a kernel needs dP^T or B^T, it loads what another has stored.

While a layer's backward pass runs it holds, beside its inputs and their gradients, in the model dtype T H (3 K + 4 BT +
6 V) elements and two states [chunks, H, V, K], and T H 2 K in fp32: 0.32 GB for jet-2b's layer at 4096 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import find_chunk, i64, sequence_bounds, silu
from jet_export.kernels.gated_delta_rule_backward_chunk import chunk_pairs_kernel, chunk_qk_kernel
from jet_export.kernels.gated_delta_rule_chunk import load_tile
from jet_export.kernels.gated_delta_rule_train_chunk import Operands, Scanned


@triton.jit(do_not_specialize=["T"])
def reverse_scan_kernel(
    q_in, k_n, inverse, attn, gates, do, dy, dv, d_states, d_final, d_initial, cu_seqlens, T, stride_do,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FINAL: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (V tiles, H, N). FINAL: the last states have a gradient; INITIAL: that of the first ones is stored."""
    i_v = tl.program_id(0) * BV
    i_h = tl.program_id(1)
    i_n = tl.program_id(2)
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    dtype: tl.constexpr = q_in.dtype.element_ty
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    n_v = V - i_v
    m_s = (o_v < n_v)[:, None] & (o_k < K)[None, :]
    o_s = (i_n.to(tl.int64) * H + i_h) * (K * V) + o_k[None, :] * V + (i_v + o_v)[:, None]
    b_dS = tl.zeros([BV, BK], tl.float32)
    if FINAL:
        b_dS += tl.load(d_final + o_s, mask=m_s, other=0.0).to(tl.float32)
    first = (bos // BT + i_n).to(tl.int64)
    n_c = tl.cdiv(eos - bos, BT)
    for i in tl.range(0, n_c, num_stages=STAGES):
        i_c = n_c - 1 - i
        i_t = (bos + i_c * BT).to(tl.int64)
        n_t = eos - i_t
        row, i_chunk = i_t * H + i_h, (first + i_c) * H + i_h
        b_do = load_tile(do + i_t * stride_do + i_h * V + i_v, o_t, o_v, stride_do, n_t, n_v, True, V % BV != 0)
        b_q = load_tile(q_in + row * K, o_t, o_k, H * K, n_t, K, True, K != BK)
        b_k = load_tile(k_n + row * K, o_t, o_k, H * K, n_t, K, True, K != BK)
        b_X = load_tile(inverse + row * BT, o_t, o_t, H * BT, n_t, BT, True, False)
        b_a = load_tile(attn + row * BT, o_t, o_t, H * BT, n_t, BT, True, False)
        b_E = tl.load(gates + i_chunk * (4 * BT) + BT + o_t)[None, :]
        b_F = tl.load(gates + i_chunk * (4 * BT) + 2 * BT + o_t)[None, :]
        b_beta = tl.load(gates + i_chunk * (4 * BT) + 3 * BT + o_t)[None, :]
        keep = tl.load(gates + i_chunk * (4 * BT) + 2 * BT - 1)
        b_dS_mma = b_dS.to(dtype)
        tl.store(d_states + i_chunk * (K * V) + (i_v + o_v)[:, None] * K + o_k[None, :], b_dS_mma, mask=m_s)
        b_dvn = tl.dot(b_dS_mma, tl.trans(b_k), input_precision=PRECISION) * b_F  # [BV, BT]
        b_dvn = tl.dot(tl.trans(b_do), b_a, acc=b_dvn, input_precision=PRECISION)
        b_dy = tl.dot(b_dvn.to(dtype), b_X, input_precision=PRECISION)
        b_dv = b_dy * b_beta
        m_vt = (o_v < n_v)[:, None] & (o_t < n_t)[None, :]
        o_vt = row * V + (i_v + o_v)[:, None] + o_t[None, :] * (H * V)
        tl.store(dy + o_vt, b_dy.to(dtype), mask=m_vt)
        tl.store(dv + o_vt, b_dv.to(dtype), mask=m_vt)
        b_dS = tl.dot(tl.trans(b_do), b_q, acc=b_dS * keep, input_precision=PRECISION)
        b_dS -= tl.dot((b_dv * b_E).to(dtype), b_k, input_precision=PRECISION)
    if INITIAL:
        tl.store(d_initial + o_s, b_dS, mask=m_s)


@triton.jit
def normalise_gradient(b_x, b_dy, SILU: tl.constexpr, L2: tl.constexpr):
    """dx [R, BK] of y = normalise(x), fp32."""
    b_s = b_x
    if SILU:
        b_s = silu(b_x)
    if L2:
        b_r = tl.rsqrt(tl.sum(b_s * b_s, 1) + 1e-6)[:, None]
        b_y = b_s * b_r
        b_dy = b_r * (b_dy - b_y * tl.sum(b_y * b_dy, 1)[:, None])
    if SILU:
        b_sigmoid = tl.sigmoid(b_x)
        b_dy = b_dy * b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid))
    return b_dy


@triton.jit(do_not_specialize=["N", "T", "M"])
def chunk_finish_kernel(
    q, k, d_qn, d_kn, part_beta, part_G, part_last, dq, dk, d_beta, dg, cu_seqlens, N, T, M,
    stride_q, stride_k, stride_dq, stride_dk,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, SILU: tl.constexpr,
    L2: tl.constexpr,
):  # fmt: skip
    """Grid (H, M chunks). On entry d_beta and dg hold the parts dbeta and dG of `chunk_pairs_kernel`."""
    i_h = tl.program_id(0)
    i_c = tl.program_id(1)
    _, bos, eos, i_t = find_chunk(cu_seqlens, i_c, N, T, BT)
    if (i_t < bos) | (i_t >= eos):
        return
    i_t = i_t.to(tl.int64)
    n_t = eos - i_t
    row = i_t * H + i_h
    o_t = tl.arange(0, BT)
    m_t = o_t < n_t
    b_beta = tl.load(d_beta + row + o_t * H, mask=m_t, other=0.0)
    b_dG = tl.load(dg + row + o_t * H, mask=m_t, other=0.0)
    last = tl.zeros([], tl.float32)
    for i_k in range(TILES):
        o_part = i_k * i64(T) * H + row + o_t * H
        b_beta += tl.load(part_beta + o_part, mask=m_t, other=0.0)
        b_dG += tl.load(part_G + o_part, mask=m_t, other=0.0)
        last += tl.load(part_last + (i_k * M + i_c).to(tl.int64) * H + i_h)
    tl.store(d_beta + row + o_t * H, b_beta, mask=m_t)
    tl.store(dg + row + o_t * H, last + tl.cumsum(b_dG, 0, reverse=True), mask=m_t)

    o_k = tl.arange(0, BK)
    m_k = m_t[:, None] & (o_k < K)[None, :]
    o_n = row * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_x = tl.load(q + i_t * stride_q + i_h * K + o_t[:, None] * stride_q + o_k[None, :], mask=m_k, other=0.0)
    b_d = tl.load(d_qn + o_n, mask=m_k, other=0.0) * (K**-0.5)
    b_d = normalise_gradient(b_x.to(tl.float32), b_d, SILU, L2)
    tl.store(
        dq + i_t * stride_dq + i_h * K + o_t[:, None] * stride_dq + o_k[None, :], b_d.to(dq.dtype.element_ty), mask=m_k
    )
    b_x = tl.load(k + i_t * stride_k + i_h * K + o_t[:, None] * stride_k + o_k[None, :], mask=m_k, other=0.0)
    b_d = normalise_gradient(b_x.to(tl.float32), tl.load(d_kn + o_n, mask=m_k, other=0.0), SILU, L2)
    tl.store(
        dk + i_t * stride_dk + i_h * K + o_t[:, None] * stride_dk + o_k[None, :], b_d.to(dk.dtype.element_ty), mask=m_k
    )


@dataclass(frozen=True)
class Inputs:
    """The op's inputs, rows contiguous, and how q and k are normalised."""

    q: Tensor  # [T, H, K]
    k: Tensor  # [T, H, K]
    v: Tensor  # [T, H, V]
    cu_seqlens: Tensor  # [N+1]
    l2: bool
    silu: bool


def delta_rule_backward_triton(
    inputs: Inputs,
    x: Operands,  # with q_n
    scanned: Scanned,  # with v_new and states
    do: Tensor,  # [T, H, V]
    d_final: Tensor | None,  # [N, H, K, V]
    dq: Tensor,  # [T, H, K], written; rows contiguous, any stride between them
    dk: Tensor,  # [T, H, K], written likewise
    needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels; dv [T, H, V]; in fp32 dbeta, dg [T, H], d_initial [N, H, K, V] (empty if not needed)."""
    (T, H, V), K, cu = do.shape, x.dims["K"], inputs.cu_seqlens
    N, M, v = cu.shape[0] - 1, x.chunks, inputs.v
    new = x.q_in.new_empty
    dims = {n: x.dims[n] for n in ("H", "K", "V", "BT", "PRECISION")}
    wide = x.q_in.dtype == torch.float32
    BK, BV, warps = (32, 32, 4) if wide else (min(128, max(16, x.dims["BK"])), 64, 8)
    dy, dv, d_states = new(T, H, V), new(T, H, V), torch.empty_like(scanned.states)
    f32 = x.gates.new_empty
    d_initial = f32(N, H, K, V) if needs_initial else f32(0)
    reverse_scan_kernel[(triton.cdiv(V, x.scan["BV"]), H, N)](
        x.q_in, x.k_n, x.inverse, x.attn, x.gates, do, dy, dv, d_states,
        x.gates if d_final is None else d_final.contiguous(), d_initial, cu, T, do.stride(0),
        FINAL=d_final is not None, INITIAL=needs_initial, **x.dims, **x.scan,
    )  # fmt: skip
    d_attn, d_A = new(T, H, dims["BT"]), new(T, H, dims["BT"])
    d_beta, dg = f32(T, H), f32(T, H)
    chunk_pairs_kernel[(H, M)](
        x.q_n, x.k_n, x.gates, v, scanned.v_new, do, dy, d_attn, d_A, d_beta, dg, cu, N, T, v.stride(0), do.stride(0),
        BK=min(64, max(16, x.dims["BK"])), BV=BV, num_warps=4, **dims,
    )  # fmt: skip
    tiles = triton.cdiv(K, BK)
    d_qn, d_kn = f32(T, H, K), f32(T, H, K)
    parts = f32(tiles, T, H), f32(tiles, T, H), f32(tiles, M, H)
    chunk_qk_kernel[(tiles, H, M)](
        x.q_n, x.k_n, x.gates, scanned.v_new, scanned.states, do, dy, d_states, d_attn, d_A, d_qn, d_kn, *parts,
        cu, N, T, M, do.stride(0), BK=BK, BV=BV, num_warps=warps, **dims,
    )  # fmt: skip
    chunk_finish_kernel[(H, M)](
        inputs.q, inputs.k, d_qn, d_kn, *parts, dq, dk, d_beta, dg, cu, N, T, M,
        inputs.q.stride(0), inputs.k.stride(0), dq.stride(0), dk.stride(0),
        H=H, K=K, BT=dims["BT"], BK=x.dims["BK"], TILES=tiles, SILU=inputs.silu, L2=inputs.l2,
        num_warps=8 if K > 128 else 4,
    )  # fmt: skip
    return dv, d_beta, dg, d_initial
