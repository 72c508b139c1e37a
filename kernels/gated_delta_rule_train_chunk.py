"""The forward kernels of the gated delta rule in training; equations in gated_delta_rule_torch.py.

`train_prepare_kernel`, parallel over (head, chunk): from q, k, beta, g the operands of the scans, by token and in the
model dtype (kn, E qn, X, P; qn too for the backward pass), and for each chunk in fp32 a row of four vectors of BT
numbers: G, exp(G), exp(G_last - G), beta. `train_scan_kernel`, parallel over (V tile, head, sequence), goes through the
chunks with state^T [BV, K] in registers, as the inference kernel does, and stores o or, for the backward pass, v_new
and the state^T before each chunk ([chunks, H, V, K], in the model dtype), or both.

Sequence n owns chunks cu_seqlens[n] // BT + n and on, of T // BT + N in all; some are nobody's and never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import dot_precision, find_chunk, num_chunks, sequence_bounds, silu
from jet_export.kernels.configs import lookup
from jet_export.kernels.gated_delta_rule_chunk import load_tile, unit_lower_inverse
from jet_export.utils.errors import JetExportError


@triton.jit
def normalise(b_x, SILU: tl.constexpr, L2: tl.constexpr):
    """Rows [R, BK] in fp32, after SiLU with SILU, of length 1 with L2."""
    b_x = b_x.to(tl.float32)
    if SILU:
        b_x = silu(b_x)
    if L2:
        b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) + 1e-6)[:, None]
    return b_x


@triton.jit(do_not_specialize=["N", "T"])
def train_prepare_kernel(
    q, k, beta, g, q_n, q_in, k_n, inverse, attn, gates, cu_seqlens, N, T, stride_q, stride_k,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SILU: tl.constexpr, L2: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (H, chunks). KEEP: qn is stored."""
    i_h = tl.program_id(0)
    i_c = tl.program_id(1)
    _, bos, eos, i_t = find_chunk(cu_seqlens, i_c, N, T, BT)
    if (i_t < bos) | (i_t >= eos):
        return
    dtype: tl.constexpr = q_in.dtype.element_ty
    row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = i_t + o_t < eos
    b_beta = tl.load(beta + row * H + i_h + o_t * H, mask=m_t, other=0.0).to(tl.float32)
    b_g = tl.load(g + row * H + i_h + o_t * H, mask=m_t, other=0.0).to(tl.float32)
    b_G = tl.cumsum(b_g, 0)
    b_E = tl.exp(b_G)
    p_gates = gates + (i_c.to(tl.int64) * H + i_h) * (4 * BT) + o_t
    tl.store(p_gates, b_G)
    tl.store(p_gates + BT, b_E)
    tl.store(p_gates + 2 * BT, tl.exp(tl.sum(b_g, 0) - b_G))
    tl.store(p_gates + 3 * BT, b_beta)

    o_k = tl.arange(0, BK)
    m_k = m_t[:, None] & (o_k < K)[None, :]
    b_q = tl.load(q + row * stride_q + i_h * K + o_t[:, None] * stride_q + o_k[None, :], mask=m_k, other=0.0)
    b_k = tl.load(k + row * stride_k + i_h * K + o_t[:, None] * stride_k + o_k[None, :], mask=m_k, other=0.0)
    o_out = (row * H + i_h) * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_kn = normalise(b_k, SILU, L2).to(dtype)
    tl.store(k_n + o_out, b_kn, mask=m_k)
    b_qn = normalise(b_q, SILU, L2) * (K**-0.5)
    tl.store(q_in + o_out, (b_qn * b_E[:, None]).to(dtype), mask=m_k)
    b_qn = b_qn.to(dtype)
    if KEEP:
        tl.store(q_n + o_out, b_qn, mask=m_k)

    o_i, o_j = o_t[:, None], o_t[None, :]
    o_tt = (row * H + i_h) * BT + o_i * (H * BT) + o_j
    b_decay = tl.where(o_i >= o_j, tl.exp(b_G[:, None] - b_G[None, :]), 0.0)
    b_attn = tl.dot(b_qn, tl.trans(b_kn), input_precision=PRECISION) * b_decay
    tl.store(attn + o_tt, b_attn.to(dtype), mask=m_t[:, None])
    b_A = tl.dot(b_kn, tl.trans(b_kn), input_precision=PRECISION) * b_decay * b_beta[:, None]
    b_X = unit_lower_inverse(tl.where(o_i > o_j, b_A, 0.0), BT, PRECISION)
    tl.store(inverse + o_tt, b_X.to(dtype), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T"])
def train_scan_kernel(
    q_in, k_n, inverse, attn, gates, v, o, v_new, states, initial_state, final_state, cu_seqlens, T, stride_v,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (V tiles, H, N). Stored: o with OUTPUT, v_new and the states before the chunks with KEEP, the last state
    with FINAL."""
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
    b_state = tl.zeros([BV, BK], tl.float32)  # state^T
    if INITIAL:
        b_state += tl.load(initial_state + o_s, mask=m_s, other=0.0).to(tl.float32)
    first = (bos // BT + i_n).to(tl.int64)
    for i_c in tl.range(0, tl.cdiv(eos - bos, BT), num_stages=STAGES):
        i_t = (bos + i_c * BT).to(tl.int64)
        n_t = eos - i_t
        row, i_chunk = i_t * H + i_h, (first + i_c) * H + i_h
        m_vt = (o_v < n_v)[:, None] & (o_t < n_t)[None, :]
        o_vt = (i_v + o_v)[:, None] + o_t[None, :] * (H * V)
        p_v = v + i_t * stride_v + i_h * V + (i_v + o_v)[:, None] + o_t[None, :] * stride_v
        b_v = tl.load(p_v, mask=m_vt, other=0.0)  # [BV, BT]
        b_k = load_tile(k_n + row * K, o_t, o_k, H * K, n_t, K, True, K != BK)
        b_X = load_tile(inverse + row * BT, o_t, o_t, H * BT, n_t, BT, True, False)
        b_E = tl.load(gates + i_chunk * (4 * BT) + BT + o_t)[None, :]
        b_F = tl.load(gates + i_chunk * (4 * BT) + 2 * BT + o_t)[None, :]
        b_beta = tl.load(gates + i_chunk * (4 * BT) + 3 * BT + o_t)[None, :]
        keep = tl.load(gates + i_chunk * (4 * BT) + 2 * BT - 1)
        b_S = b_state.to(dtype)
        b_r = b_v.to(tl.float32) - tl.dot(b_S, tl.trans(b_k), input_precision=PRECISION) * b_E
        b_vn = tl.dot((b_r * b_beta).to(dtype), tl.trans(b_X), input_precision=PRECISION)  # [BV, BT]
        if OUTPUT:
            b_q = load_tile(q_in + row * K, o_t, o_k, H * K, n_t, K, True, K != BK)
            b_a = load_tile(attn + row * BT, o_t, o_t, H * BT, n_t, BT, True, False)
            b_o = tl.dot(b_S, tl.trans(b_q), input_precision=PRECISION)
            b_o = tl.dot(b_vn.to(dtype), tl.trans(b_a), acc=b_o, input_precision=PRECISION)
            tl.store(o + row * V + o_vt, b_o.to(dtype), mask=m_vt)
        if KEEP:
            p_S = states + i_chunk * (K * V) + (i_v + o_v)[:, None] * K + o_k[None, :]
            tl.store(p_S, b_S, mask=m_s)
            tl.store(v_new + row * V + o_vt, b_vn.to(dtype), mask=m_vt)
        b_state = tl.dot((b_vn * b_F).to(dtype), b_k, acc=b_state * keep, input_precision=PRECISION)
    if FINAL:
        tl.store(final_state + o_s, b_state, mask=m_s)


@dataclass(frozen=True)
class Operands:
    """What the prepare kernel stores, and how it and the scans are launched."""

    q_n: Tensor  # [T, H, K], or q_in where it is not kept
    q_in: Tensor  # [T, H, K]
    k_n: Tensor  # [T, H, K]
    inverse: Tensor  # [T, H, BT]
    attn: Tensor  # [T, H, BT]
    gates: Tensor  # [chunks, H, 4, BT] fp32
    dims: dict[str, Any]  # H, K, V, BT, BK, PRECISION
    scan: dict[str, Any]  # BV, STAGES, num_warps
    chunks: int


def blocks(dtype: torch.dtype, head_k_dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """BT, BK and launch options of the prepare kernel, which are those of inference, and the options of the scans.

    The scans' are not measured: they are those with which neither scan spills more than 48 bytes on SM 9.0, and three
    stages where they fit, since with two a load waits for its use."""
    prepare = lookup("delta_rule_prepare", dtype=dtype, head_k_dim=head_k_dim)
    if dtype == torch.float32:
        scan = {"BV": 16, "STAGES": 1, "num_warps": 4}
    elif head_k_dim > 128:
        scan = {"BV": 32, "STAGES": 1, "num_warps": 8}
    else:
        scan = {"BV": 64, "STAGES": 3, "num_warps": 8}
    return {**prepare, "BK": max(16, triton.next_power_of_2(head_k_dim))}, scan


def prepare(
    q: Tensor,  # [T, H, K]
    k: Tensor,  # [T, H, K]
    beta: Tensor,  # [T, H]
    g: Tensor,  # [T, H]
    cu_seqlens: Tensor,
    head_v_dim: int,
    *,
    l2: bool,
    silu: bool,
    keep: bool,
) -> Operands:
    """Launches the kernel. Rows of q and k are contiguous, with any stride between them."""
    (T, H, K), N = q.shape, cu_seqlens.shape[0] - 1
    if K > 256:
        raise JetExportError(
            f"The gated delta rule's kernels train heads of K up to 256, not {K}.", "Use smaller heads."
        )
    use, scan = blocks(q.dtype, K)
    BT, BK = use.pop("BT"), use.pop("BK")
    dims = {"H": H, "K": K, "BT": BT, "BK": BK, "PRECISION": dot_precision(q.dtype)}
    M = num_chunks(T, N, BT)
    q_in, k_n = q.new_empty(T, H, K), q.new_empty(T, H, K)
    q_n = q.new_empty(T, H, K) if keep else q_in
    inverse, attn = q.new_empty(T, H, BT), q.new_empty(T, H, BT)
    gates = q.new_empty(M, H, 4, BT, dtype=torch.float32)
    train_prepare_kernel[(H, M)](
        q, k, beta.contiguous(), g.contiguous(), q_n, q_in, k_n, inverse, attn, gates, cu_seqlens, N, T,
        q.stride(0), k.stride(0), SILU=silu, L2=l2, KEEP=keep, **dims, **use,
    )  # fmt: skip
    return Operands(q_n, q_in, k_n, inverse, attn, gates, {**dims, "V": head_v_dim}, scan, M)


@dataclass(frozen=True)
class Scanned:
    """Results of a forward scan; a part that was not asked for is an operand, which stands in as a pointer."""

    o: Tensor  # [T, H, V]
    v_new: Tensor  # [T, H, V]
    states: Tensor  # [chunks, H, V, K]
    final_state: Tensor  # [N, H, K, V] fp32


def scan(
    x: Operands,
    v: Tensor,  # [T, H, V], rows contiguous
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    *,
    output: bool,
    keep: bool,
) -> Scanned:
    """Launches the kernel: o with `output`, v_new and states with `keep`, final_state without it."""
    (T, H, V), K, N = v.shape, x.dims["K"], cu_seqlens.shape[0] - 1
    o = x.q_in.new_empty(T, H, V) if output else x.q_in
    v_new = x.q_in.new_empty(T, H, V) if keep else x.q_in
    states = x.q_in.new_empty(x.chunks, H, V, K) if keep else x.q_in
    final = x.gates if keep else x.gates.new_empty(N, H, K, V)
    initial = x.gates if initial_state is None else initial_state.contiguous()
    train_scan_kernel[(triton.cdiv(V, x.scan["BV"]), H, N)](
        x.q_in, x.k_n, x.inverse, x.attn, x.gates, v, o, v_new, states, initial, final, cu_seqlens, T, v.stride(0),
        INITIAL=initial_state is not None, FINAL=not keep, OUTPUT=output, KEEP=keep, **x.dims, **x.scan,
    )  # fmt: skip
    return Scanned(o, v_new, states, final)
