"""Gated RMS norm over a head: out = o * rsqrt(mean_V(o^2) + eps) * w_o * silu(gate), fp32 inside, one rounding.

    codes = E4M3(out / out_scale)                   with out_scale [1] fp32: what the next FP8 layer multiplies

o, gate [T, H, V]; w_o [V] is shared by the heads. The norm comes before the gate. out is rounded first, then quantised:
the codes are those of a kernel that reads the rounded out.
Source: Gated DeltaNet, arXiv 2412.06464, figure 1; used unchanged by Jet-Nemotron's JetBlock.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import acc_dtype, by_rows, fp32, rows, silu, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.gemv import FP8, codes
from jet_export.kernels.triton_op import triton_op


def gated_rms_norm_ref(
    o: Tensor,  # [T, H, V]
    w_o: Tensor,  # [V]
    gate: Tensor,  # [T, H, V]
    eps: float,
) -> Tensor:  # [T, H, V]
    """The specification, in plain torch; the result has gate's dtype."""
    acc = acc_dtype(gate.dtype)
    o_acc = o.to(acc)
    normed = o_acc * torch.rsqrt(o_acc.square().mean(-1, keepdim=True) + eps) * w_o.to(acc)
    return (normed * by_rows(torch.nn.functional.silu, gate.to(acc))).to(gate.dtype)


@triton.jit
def gated_norm_tile(b_o, b_w, b_gate, eps, V: tl.constexpr):
    """fp32 tiles b_o, b_gate [R, BV], b_w [1, BV]; columns past V must be zero in b_o.

    A zero stays zero whatever its gate: padding rows have o = 0 and arbitrary gates."""
    b_rstd = tl.rsqrt(tl.sum(b_o * b_o, 1) / V + fp32(eps))
    return tl.where(b_o == 0.0, 0.0, b_o * b_rstd[:, None] * b_w * silu(b_gate))


@triton.jit
def rounded(b_out, scale, dtype: tl.constexpr, CODES: tl.constexpr):
    """fp32 to the model dtype; with CODES, that to E4M3."""
    b_out = b_out.to(dtype)
    if CODES:
        b_out = codes(b_out.to(tl.float32), scale).to(tl.float8e4nv)
    return b_out


@triton.jit(do_not_specialize=["T"])
def gated_rms_norm_kernel(
    o, w_o, gate, out_scale, out, T, stride_o, stride_gate, eps,
    OFF_Z: tl.constexpr, H: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Grid (H, blocks of BR tokens)."""
    scale = 1.0
    if CODES:
        scale = tl.load(out_scale)
    i_h = tl.program_id(0)
    o_t = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    m = (o_t < T)[:, None] & m_v[None, :]
    o_c = (i_h * V + o_v)[None, :]
    b_o = tl.load(o + o_t[:, None] * stride_o + o_c, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + o_t[:, None] * stride_gate + OFF_Z + o_c, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(w_o + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    b_out = gated_norm_tile(b_o, b_w, b_gate, eps, V)
    b_out = rounded(b_out, scale, gate.dtype.element_ty, CODES)
    tl.store(out + o_t[:, None] * H * V + o_c, b_out, mask=m)


def empty_out(like: Tensor, shape: tuple[int, int, int], out_scale: Tensor | None) -> Tensor:
    """What a gated norm is written to: in like's dtype, or codes."""
    return like.new_empty(*shape, dtype=like.dtype if out_scale is None else FP8)


def gated_rms_norm_triton(
    o: Tensor, w_o: Tensor, gate: Tensor, eps: float, off_gate: int = 0, out_scale: Tensor | None = None
) -> Tensor:
    """Launches the kernel. Rows of o [T, H, V] and gate are contiguous, with any stride between them.

    off_gate: gate's first column in the rows of its tensor. With out_scale [1] the result is codes."""
    T, H, V = o.shape
    BR = lookup("gated_rms_norm", dtype=gate.dtype, head_v_dim=V)["BR"]
    out = empty_out(gate, (T, H, V), out_scale)
    wrap(gated_rms_norm_kernel)[(H, triton.cdiv(T, BR))](
        o, w_o, gate, w_o if out_scale is None else out_scale, out, T, o.stride(0), gate.stride(0), eps,
        OFF_Z=off_gate, H=H, V=V, BR=BR, BV=triton.next_power_of_2(V), CODES=out_scale is not None,
    )  # fmt: skip
    return out


@torch.library.custom_op("jet::gated_rms_norm_cpu", mutates_args=())
def gated_rms_norm_cpu(o: Tensor, w_o: Tensor, gate: Tensor, eps: float) -> Tensor:
    return gated_rms_norm_ref(o, w_o, gate, eps).contiguous()


@gated_rms_norm_cpu.register_fake
def _(o, w_o, gate, eps):
    return gate.new_empty(gate.shape)


@triton_op("jet::gated_rms_norm", mutates_args=())
def gated_rms_norm(o: Tensor, w_o: Tensor, gate: Tensor, eps: float) -> Tensor:
    """[T, H, V] in gate's dtype. See the module's equation."""
    if o.device.type == "cpu":
        return torch.ops.jet.gated_rms_norm_cpu(o, w_o, gate, eps)
    return gated_rms_norm_triton(rows(o), w_o, rows(gate), eps)
