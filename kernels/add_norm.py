"""The sum of a residual and a layer's output, and its norm: what joins the parts that skinny_gemm.py cuts a layer into.

    y = (sum_s p_s) x_scale w_scale + bias      rounded
    h = residual + y                            rounded
    a = RMS(h) norm_weight                      rounded
    codes = E4M3(a / y_scale)                   with y_scale
    z = a W_z^T                                 with W_z [n, N]: a layer too small for a launch of its own; rounded

p [S, M, N] in fp32, summed in the order of s. The scales [1], fp32, of an FP8 layer (model/fp8.py) come together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import acc_dtype, await_inputs, fp32, gdc, i64, wrap
from jet_export.kernels.gemv import FP8, codes, to_codes
from jet_export.kernels.triton_op import triton_op


def scaled(
    y: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A layer's output from its sums."""
    if x_scale is not None:
        assert w_scale is not None
        y = y * (x_scale.to(y.dtype) * w_scale.to(y.dtype))
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


def add_norm_ref(
    partials: Tensor,  # [S, M, N] fp32
    x_scale: Tensor | None,  # [1]
    w_scale: Tensor | None,  # [1]
    bias: Tensor | None,  # [N]
    residual: Tensor,  # [M, N]
    norm_weight: Tensor,  # [N]
    y_scale: Tensor | None,  # [1]
    z_weight: Tensor | None,  # [n, N]
    norm_eps: float,
    values: bool,  # whether a is wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # h, a and codes [M, N], z [M, n]; what is not wanted [0]
    """The specification."""
    dtype, acc = residual.dtype, acc_dtype(residual.dtype)
    y = scaled(partials.to(acc).sum(0), x_scale, w_scale, bias, dtype)
    h = (residual.to(acc) + y.to(acc)).to(dtype)
    h32 = h.to(acc)
    a = (norm_weight.to(acc) * (h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + norm_eps))).to(dtype)
    codes = a.new_empty(0, dtype=FP8) if y_scale is None else to_codes(a.to(acc), y_scale)
    z = a.new_empty(0) if z_weight is None else (a.to(acc) @ z_weight.to(acc).t()).to(dtype)
    return h, a if values else a.new_empty(0), codes, z


@triton.jit(do_not_specialize=["M"])
def add_norm_kernel(
    partials, x_scale, w_scale, bias, residual, norm_weight, y_scale, z_weight, h, a, codes_out, z, M, eps,
    N: tl.constexpr, Z: tl.constexpr, BZ: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr,
    BIASED: tl.constexpr, VALUES: tl.constexpr, CODES: tl.constexpr, GDC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (M): a program a token, all N columns."""
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    b_norm = tl.load(norm_weight + o_n, mask=m_n, other=0.0).to(tl.float32)
    dtype: tl.constexpr = h.dtype.element_ty
    zero = await_inputs(GDC) * 16
    row = tl.program_id(0).to(tl.int64)
    p = partials + zero + row * N + o_n
    b_y = tl.load(p, mask=m_n, other=0.0)
    for s in tl.static_range(1, SPLITS):  # in this order, whatever was ready first
        b_y += tl.load(p + s * i64(M) * N, mask=m_n, other=0.0)
    if SCALED:
        b_y *= tl.load(x_scale) * tl.load(w_scale)
    if BIASED:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_y = b_y.to(dtype).to(tl.float32)
    b_h = tl.load(residual + zero + row * N + o_n, mask=m_n, other=0.0).to(tl.float32) + b_y
    b_h = b_h.to(dtype).to(tl.float32)
    tl.store(h + row * N + o_n, b_h.to(dtype), mask=m_n)
    rstd = tl.rsqrt(tl.sum(b_h * b_h, 0) / N + fp32(eps))
    b_a = (b_norm * (b_h * rstd)).to(dtype).to(tl.float32)
    if VALUES:
        tl.store(a + row * N + o_n, b_a.to(dtype), mask=m_n)
    if CODES:
        b_codes = codes(b_a, tl.load(y_scale))
        tl.store(codes_out + row * N + o_n, b_codes.to(codes_out.dtype.element_ty), mask=m_n)
    for i_z in tl.static_range(0, Z, BZ):
        o_z = i_z + tl.arange(0, BZ)
        m_z = o_z < Z
        b_w = tl.load(z_weight + o_z[:, None] * N + o_n[None, :], mask=m_z[:, None] & m_n[None, :], other=0.0)
        b_z = tl.sum(b_w.to(tl.float32) * b_a[None, :], 1)
        tl.store(z + row * Z + o_z, b_z.to(dtype), mask=m_z)


def outputs(
    residual: Tensor, y_scale: Tensor | None, z_weight: Tensor | None, values: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, a, codes and z, unwritten."""
    a = torch.empty_like(residual) if values else residual.new_empty(0)
    codes = residual.new_empty(0, dtype=FP8) if y_scale is None else torch.empty_like(residual, dtype=FP8)
    z = residual.new_empty(0) if z_weight is None else residual.new_empty(residual.shape[0], z_weight.shape[0])
    return torch.empty_like(residual), a, codes, z


def add_norm_triton(
    partials: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    y_scale: Tensor | None,
    z_weight: Tensor | None,
    norm_eps: float,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as `add_norm_ref`, contiguous."""
    S, M, N = partials.shape
    h, a, codes, z = outputs(residual, y_scale, z_weight, values)
    BN = triton.next_power_of_2(N)
    given = [partials if t is None else t for t in (x_scale, w_scale, bias, y_scale, z_weight)]
    wrap(add_norm_kernel)[(M,)](
        partials, *given[:3], residual, norm_weight, *given[3:], h, a, codes, z, M, norm_eps,
        N=N, Z=0 if z_weight is None else len(z_weight), BZ=8, SPLITS=S, SCALED=x_scale is not None,
        BIASED=bias is not None, VALUES=values, CODES=y_scale is not None, GDC=gdc(), BN=BN,
        num_warps=max(1, min(8, BN // 256)),
    )  # fmt: skip
    return h, a, codes, z


@torch.library.custom_op("jet::add_norm_cpu", mutates_args=())
def add_norm_cpu(
    partials: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    y_scale: Tensor | None,
    z_weight: Tensor | None,
    norm_eps: float,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return add_norm_ref(partials, x_scale, w_scale, bias, residual, norm_weight, y_scale, z_weight, norm_eps, values)


@add_norm_cpu.register_fake
def _(partials, x_scale, w_scale, bias, residual, norm_weight, y_scale, z_weight, norm_eps, values):
    return outputs(residual, y_scale, z_weight, values)


@triton_op("jet::add_norm", mutates_args=())
def add_norm(
    partials: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    y_scale: Tensor | None,
    z_weight: Tensor | None,
    norm_eps: float,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as `add_norm_ref`."""
    if residual.device.type == "cpu":
        return torch.ops.jet.add_norm_cpu(
            partials, x_scale, w_scale, bias, residual, norm_weight, y_scale, z_weight, norm_eps, values
        )
    return add_norm_triton(
        partials, x_scale, w_scale, bias, residual.contiguous(), norm_weight, y_scale, z_weight, norm_eps, values
    )
