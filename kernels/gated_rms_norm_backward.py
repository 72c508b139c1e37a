"""Gradients of the gated RMS norm (forward: gated_rms_norm.py). Per head, with r = rsqrt(mean_V(o^2) + eps):

n = o r w_o;   out = n silu(gate);   dgate = dout n silu'(gate);   dn = dout silu(gate)
dw_o = sum over tokens and heads of dn o r;   do = r (dn w_o - o r mean_V(dn w_o o r))
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import acc_dtype, fp32
from jet_export.kernels.gated_delta_rule_torch import silu_gradient

ELEMENTS, BLOCKS = 2048, 4  # of a block in registers, and blocks a program; not measured


def gated_rms_norm_forward_torch(o: Tensor, w_o: Tensor, gate: Tensor, eps: float) -> Tensor:
    """[T, H, V] in fp32 (fp64 for fp64 inputs)."""
    acc = acc_dtype(gate.dtype)
    o = o.to(acc)
    return o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * w_o.to(acc) * torch.nn.functional.silu(gate.to(acc))


def gated_rms_norm_backward_torch(
    o: Tensor,  # [T, H, V]
    w_o: Tensor,  # [V]
    gate: Tensor,  # [T, H, V]
    eps: float,
    dout: Tensor,  # [T, H, V]
) -> tuple[Tensor, Tensor, Tensor]:  # do [T, H, V], dw_o [V], dgate [T, H, V]
    """In fp32 (fp64 for fp64 inputs)."""
    acc = acc_dtype(gate.dtype)
    o, w_o, gate, dout = (x.to(acc) for x in (o, w_o, gate, dout))
    r = (o.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, dn = o * r, dout * torch.nn.functional.silu(gate)
    dnw = dn * w_o
    do = r * (dnw - normed * (dnw * normed).mean(-1, keepdim=True))
    return do, (dn * normed).sum((0, 1)), silu_gradient(gate, dout * normed * w_o)


@triton.jit(do_not_specialize=["T"])
def gated_norm_backward_kernel(
    o, w_o, gate, dout, do, dgate, part_w, T, stride_o, stride_gate, stride_dgate, eps,
    H: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (H, blocks of BR * BLOCKS tokens). part_w [blocks, H, V]: what each program adds to dw_o."""
    i_h = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    o_c = (i_h * V + o_v)[None, :]
    b_w = tl.load(w_o + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([BV], tl.float32)
    for i in range(BLOCKS):
        o_t = (i_b * BLOCKS + i) * BR + tl.arange(0, BR)
        m = (o_t < T)[:, None] & m_v[None, :]
        o_out = o_t[:, None] * (H * V) + o_c
        b_o = tl.load(o + o_t[:, None] * stride_o + o_c, mask=m, other=0.0).to(tl.float32)
        b_gate = tl.load(gate + o_t[:, None] * stride_gate + o_c, mask=m, other=0.0).to(tl.float32)
        b_dout = tl.load(dout + o_out, mask=m, other=0.0).to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_o * b_o, 1) / V + fp32(eps))[:, None]
        b_n = b_o * b_r
        b_sigmoid = tl.sigmoid(b_gate)
        b_dn = b_dout * b_gate * b_sigmoid
        b_dw += tl.sum(b_dn * b_n, 0)
        b_dnw = b_dn * b_w
        b_do = b_r * (b_dnw - b_n * (tl.sum(b_dnw * b_n, 1) / V)[:, None])
        b_dgate = b_dout * b_n * b_w * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
        tl.store(do + o_out, b_do.to(do.dtype.element_ty), mask=m)
        tl.store(dgate + o_t[:, None] * stride_dgate + o_c, b_dgate.to(dgate.dtype.element_ty), mask=m)
    tl.store(part_w + (i_b * H + i_h) * V + o_v, b_dw, mask=m_v)


def gated_rms_norm_backward_triton(
    o: Tensor,  # [T, H, V]
    w_o: Tensor,  # [V]
    gate: Tensor,  # [T, H, V]
    eps: float,
    dout: Tensor,  # [T, H, V], contiguous
    dgate: Tensor,  # [T, H, V], written
) -> tuple[Tensor, Tensor]:  # do [T, H, V] in o's dtype, dw_o [V] fp32
    """Launches the kernel. Rows are contiguous, with any stride between them where not said otherwise."""
    T, H, V = o.shape
    BV = triton.next_power_of_2(V)
    BR = max(1, ELEMENTS // BV)
    blocks = triton.cdiv(T, BR * BLOCKS)
    do, part_w = o.new_empty(T, H, V), o.new_empty(blocks, H, V, dtype=torch.float32)
    gated_norm_backward_kernel[(H, blocks)](
        o, w_o, gate, dout, do, dgate, part_w, T, o.stride(0), gate.stride(0), dgate.stride(0), eps,
        H=H, V=V, BR=BR, BV=BV, BLOCKS=BLOCKS,
    )  # fmt: skip
    return do, part_w.sum((0, 1))
