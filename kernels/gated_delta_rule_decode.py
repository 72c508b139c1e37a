"""One decode step of the gated delta rule for N sequences: equations in gated_delta_rule.py, one launch.

A program owns a (head, sequence): it streams S [K, V] through registers in tiles of BV columns, reading and writing
every element once. Both products with S are taken before the update: o = exp(g) S^T qn + (qn . kn) delta.
With W > 0 it is a whole JetBlock step: its inputs are the raw projections, and it also does SiLU, the dynamic
convolution (shifting conv_state), beta and g, and the gated norm over the head.
"""

import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import wrap
from jet_export.kernels.dynamic_conv import conv_tile, shift_conv_state
from jet_export.kernels.gated_delta_rule_chunk import gates, load_normed
from jet_export.kernels.gated_rms_norm import gated_norm_tile


@triton.jit
def decode_kernel(
    q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, conv_state, recurrent_state, out, slots, context_lens,
    stride_q, stride_k, stride_v, stride_b, stride_g, stride_kappa, stride_gate, eps,
    OFF_Q: tl.constexpr, OFF_K: tl.constexpr, OFF_V: tl.constexpr, OFF_G: tl.constexpr, OFF_Z: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (H, N). OFF_*: columns of q, k, v (u), g (a), gate in their rows. NV: a power of two >= the V tiles."""
    i_h = tl.program_id(0)
    i_n = tl.program_id(1)
    slot = tl.load(slots + i_n).to(tl.int64)
    held = tl.load(context_lens + i_n) > 0
    row = i_n.to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    o_one = tl.arange(0, 1)
    o_tiles = tl.arange(0, NV)[:, None] * BV + tl.arange(0, BV)[None, :]
    m_tiles = o_tiles < V
    p_out = out + row * (H * V) + i_h * V
    if slot < 0:
        tl.store(p_out + o_tiles, tl.zeros([NV, BV], dtype), mask=m_tiles)
        return
    b_beta, b_g = gates(
        beta + row * stride_b + i_h, g + row * stride_g + OFF_G + i_h, 0, 0, A_log, dt_bias, i_h, o_one, o_one < 1,
        dtype, W > 0,
    )  # fmt: skip
    b_decay = tl.exp(b_g)
    b_q = load_normed(q + row * stride_q + OFF_Q + i_h * K, 0, o_one, o_one < 1, K, BK, W > 0) * (K**-0.5)
    b_k = load_normed(k + row * stride_k + OFF_K + i_h * K, 0, o_one, o_one < 1, K, BK, W > 0)
    b_qk = tl.sum(b_q * b_k, 1)  # [1]
    b_q, b_k = tl.reshape(b_q, [BK, 1]), tl.reshape(b_k, [BK, 1])

    o_k = tl.arange(0, BK)[:, None]
    p_S = recurrent_state + (slot * H + i_h) * (K * V) + o_k * V
    p_v = v + row * stride_v + OFF_V + i_h * V
    p_conv = conv_state + slot * ((W - 1) * H * V) + i_h * V
    b_o = tl.zeros([NV, BV], tl.float32)
    for i_tile in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        i_v = i_tile * BV
        o_v = i_v + tl.arange(0, BV)
        m_S = (o_k < K) & (o_v < V)[None, :]
        b_S = tl.load(p_S + o_v[None, :], mask=m_S & held, other=0.0).to(tl.float32) * b_decay[None, :]
        if W > 0:
            p_kappa = kappa + row * stride_kappa + i_h * V * W
            b_v = conv_tile(p_v, 0, p_kappa, 0, p_conv, o_one, o_one < 1, i_v, V, 0, held, H * V, W, BV)
        else:
            b_v = tl.load(p_v + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
        b_delta = b_beta[:, None] * (b_v - tl.sum(b_S * b_k, 0)[None, :])  # [1, BV]
        b_ot = tl.sum(b_S * b_q, 0)[None, :] + b_qk[:, None] * b_delta
        b_o = tl.where(tl.arange(0, NV)[:, None] == i_tile, b_ot, b_o)
        tl.store(p_S + o_v[None, :], (b_S + b_k * b_delta).to(recurrent_state.dtype.element_ty), mask=m_S)
    if W > 0:
        o_v = tl.arange(0, NV * BV)
        m_v = o_v < V
        b_gate = tl.load(gate + row * stride_gate + OFF_Z + i_h * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_w = tl.load(w_o + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_out = gated_norm_tile(tl.reshape(b_o, [1, NV * BV]), b_w[None, :], b_gate[None, :], eps, V)
        tl.store(p_out + o_v[None, :], b_out.to(dtype), mask=m_v[None, :])
        tl.debug_barrier()  # every thread has read the old conv_state
        shift_conv_state(p_conv, p_v + stride_v, stride_v, 1, o_v, m_v, held, H * V, W)
    else:
        tl.store(p_out + o_tiles, b_o.to(dtype), mask=m_tiles)


def decode_config(state: Tensor, head_k_dim: int, head_v_dim: int) -> dict:
    """Tiles of 128 bytes a row of S, three in flight."""
    BV = 128 // state.element_size()
    NV = triton.next_power_of_2(triton.cdiv(head_v_dim, BV))
    return {"BK": triton.next_power_of_2(head_k_dim), "BV": BV, "NV": NV, "STAGES": 3, "num_warps": 4}


def decode_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, recurrent_state: Tensor,
    slots: Tensor, context_lens: Tensor, head_dims: tuple[int, int, int],
    offsets: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0),
    conv: tuple[Tensor, Tensor] | None = None, raw_gates: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """o (with norm: the gated norm of o) [N, H, V] in q's dtype; states in place. Arguments as
    `chunk_delta_rule_triton`; norm = (w_o, gate, eps), its gate's first column last in `offsets`."""
    H, K, V = head_dims
    kappa, conv_state = conv or (q, q)
    A_log, dt_bias = raw_gates or (g, g)
    w_o, gate, eps = norm or (q, q, 0.0)
    W = conv_state.shape[1] + 1 if conv else 0
    out = q.new_empty(q.shape[0], H, V)
    off_q, off_k, off_v, off_g, off_z = offsets
    wrap(decode_kernel)[(H, q.shape[0])](
        q, k, v, beta, g, kappa, A_log, dt_bias, w_o, gate, conv_state, recurrent_state, out, slots, context_lens,
        q.stride(0), k.stride(0), v.stride(0), beta.stride(0), g.stride(0), kappa.stride(0), gate.stride(0), eps,
        OFF_Q=off_q, OFF_K=off_k, OFF_V=off_v, OFF_G=off_g, OFF_Z=off_z, H=H, K=K, V=V, W=W,
        **decode_config(recurrent_state, K, V),
    )  # fmt: skip
    return out
