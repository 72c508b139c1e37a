"""Linear layer of one token with what stands around it; every weight is read once.

    a = x;  RMS(x) * norm_weight;  or silu(x)               rounded to the model dtype
    a = E4M3(a / x_scale)                                   in an FP8 layer, unless x is in E4M3 already
    y = (W a) * x_scale * w_scale + bias                    sums in fp32, rounded
    y = silu(y[:N/2]) * y[N/2:]                             `gated`: W is [gate | up]; rounded after each of the two
    y = residual + y                                        rounded
    y = E4M3(y / y_scale)                                   with y_scale: what the next FP8 layer multiplies;
                                                            x is in the model dtype then

x [1, K] and W [N, K]; E4M3(z) clamps to -448 .. 448. With one row of x the product is bound by reading W (N K bytes in
FP8), and tensor cores would idle; each program computes BN outputs, and norms or quantises x for itself. The scales are
an FP8 layer's (model/fp8.py), [1] fp32; x_scale and w_scale come together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import acc_dtype, ahead_of, ask_ahead, await_inputs, fp32, gdc, i64, silu, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.triton_op import triton_op

FP8 = torch.float8_e4m3fn
FP8_MAX: tl.constexpr = tl.constexpr(448.0)  # largest finite float8_e4m3fn


def to_codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float32).to(FP8)


def gemv_ref(
    x: Tensor,  # [1, K], model dtype or float8_e4m3fn
    weight: Tensor,  # [N, K]
    x_scale: Tensor | None,  # [1]
    w_scale: Tensor | None,  # [1]
    bias: Tensor | None,  # [N]
    norm_weight: Tensor | None,  # [K]
    residual: Tensor | None,  # [1, N]
    y_scale: Tensor | None,  # [1]
    norm_eps: float,
    silu: bool,
    gated: bool,
    dtype: torch.dtype,  # the model dtype
) -> Tensor:  # [1, N], of a gated layer [1, N / 2]; in dtype, or with y_scale in float8_e4m3fn
    """The specification, in fp32 (fp64 for fp64 inputs)."""
    acc = acc_dtype(dtype)
    a = x.to(acc)
    if norm_weight is not None:
        normed = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + norm_eps)
        a = (norm_weight.to(acc) * normed).to(dtype).to(acc)
    if silu:
        a = F.silu(a).to(dtype).to(acc)
    if x_scale is not None and x.dtype != FP8:
        a = to_codes(a, x_scale).to(acc)
    y = a @ weight.to(acc).t()
    if x_scale is not None and w_scale is not None:
        y = y * (x_scale * w_scale)
    y = (y if bias is None else y + bias.to(acc)).to(dtype)
    if gated:
        gate, up = y.to(acc).chunk(2, -1)
        y = (F.silu(gate).to(dtype).to(acc) * up).to(dtype)
    if residual is not None:
        y = (residual.to(acc) + y.to(acc)).to(dtype)
    return y if y_scale is None else to_codes(y.to(acc), y_scale)


@triton.jit
def codes(x, scale):
    """The numbers x / scale, fp32, clamped to what E4M3 holds. NaN stays NaN."""
    return tl.clamp(x / scale, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def factors(x, norm_weight, o_k, m_k, rstd, scale, NORM: tl.constexpr, SILU: tl.constexpr, QUANTISE: tl.constexpr):
    """What the weights of columns o_k are multiplied with, fp32."""
    b_x = tl.load(x + o_k, mask=m_k, other=0.0)
    dtype: tl.constexpr = b_x.dtype
    b_a = b_x.to(tl.float32)
    if NORM:
        b_norm = tl.load(norm_weight + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_a = (b_norm * (b_a * rstd)).to(dtype).to(tl.float32)
    if SILU:
        b_a = silu(b_a).to(dtype).to(tl.float32)
    if QUANTISE:
        b_a = codes(b_a, scale).to(tl.float8e4nv).to(tl.float32)
    return b_a


@triton.jit
def products(b_w, b_a):
    return b_w.to(tl.float32) * b_a[None, :]


@triton.jit
def output(b_y, x_scale, w_scale, bias, o_n, m_n, dtype: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """One linear layer's outputs o_n from their sums, rounded, as fp32."""
    if SCALED:
        b_y *= tl.load(x_scale) * tl.load(w_scale)
    if BIASED:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_y.to(dtype).to(tl.float32)


@triton.jit
def gemv_kernel(
    x, weight, x_scale, w_scale, bias, norm_weight, residual, y_scale, ahead, ahead_more, y, N, eps,
    K: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, QUANTISE: tl.constexpr, SCALED: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, CODES: tl.constexpr,
    GDC: tl.constexpr, AHEAD: tl.constexpr, AHEAD_MORE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BN outputs). N: outputs, half the rows of W if GATED. With NORM, BK >= K. AHEAD, AHEAD_MORE:
    bytes of other weights that L2 is asked for."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_zero = ask_ahead(ahead, ahead_more, tl.program_id(0), tl.num_programs(0), AHEAD, AHEAD_MORE)
    o_k = tl.arange(0, BK)
    m_n = o_n < N
    p_w = weight + (o_n + o_zero).to(tl.int64)[:, None] * K + o_k[None, :]
    up = i64(N) * K
    dtype: tl.constexpr = x.dtype.element_ty if CODES else y.dtype.element_ty
    scale = 1.0
    if QUANTISE:
        scale = tl.load(x_scale)
    if NORM:  # the weights are on their way while x is normed
        m_k = o_k < K
        m_w = m_n[:, None] & m_k[None, :]
        b_w = tl.load(p_w, mask=m_w, other=0.0)
        if GATED:
            b_w_up = tl.load(p_w + up, mask=m_w, other=0.0)
        zero = await_inputs(GDC) * 16  # known to be a multiple: x stays aligned
        x += zero
        residual += zero
        b_x = tl.load(x + o_k, mask=m_k, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(b_x * b_x, 0) / K + fp32(eps))
        b_a = factors(x, norm_weight, o_k, m_k, rstd, scale, NORM, SILU, QUANTISE)
        b_y = tl.sum(products(b_w, b_a), 1)
        if GATED:
            b_up = tl.sum(products(b_w_up, b_a), 1)
    else:
        zero = await_inputs(GDC) * 16  # known to be a multiple: x stays aligned
        x += zero
        residual += zero
        b_acc = tl.zeros([BN, BK], tl.float32)
        if GATED:
            b_acc_up = tl.zeros([BN, BK], tl.float32)
        for i_k in tl.range(0, K, BK, num_stages=STAGES):
            if K % BK == 0:
                m_k = o_k < BK
                m_w = m_n[:, None]
            else:
                m_k = i_k + o_k < K
                m_w = m_n[:, None] & m_k[None, :]
            b_w = tl.load(p_w + i_k, mask=m_w, other=0.0)
            b_a = factors(x, norm_weight, i_k + o_k, m_k, 1.0, scale, NORM, SILU, QUANTISE)
            b_acc += products(b_w, b_a)
            if GATED:
                b_acc_up += products(tl.load(p_w + up + i_k, mask=m_w, other=0.0), b_a)
        b_y = tl.sum(b_acc, 1)
        if GATED:
            b_up = tl.sum(b_acc_up, 1)
    b_y = output(b_y, x_scale, w_scale, bias, o_n, m_n, dtype, SCALED, BIASED)
    if GATED:
        b_up = output(b_up, x_scale, w_scale, bias + N, o_n, m_n, dtype, SCALED, BIASED)
        b_y = (silu(b_y).to(dtype).to(tl.float32) * b_up).to(dtype).to(tl.float32)
    if RESIDUAL:
        b_y = (tl.load(residual + o_n, mask=m_n, other=0.0).to(tl.float32) + b_y).to(dtype).to(tl.float32)
    if CODES:
        b_y = codes(b_y, tl.load(y_scale))
    tl.store(y + o_n, b_y.to(y.dtype.element_ty), mask=m_n)


def gemv_triton(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    norm_eps: float,
    silu: bool,
    gated: bool,
    dtype: torch.dtype,
    ahead: Sequence[Tensor] = (),
) -> Tensor:
    """Launches the kernel; arguments as `gemv_ref`, contiguous. ahead: up to two weights that the kernels behind this
    one read."""
    (rows, K), N = weight.shape, weight.shape[0] // (2 if gated else 1)
    facts = {"out_features": rows, "in_features": K, "normed": norm_weight is not None, "gated": gated}
    use = lookup("gemv", dtype=weight.dtype, **facts)
    if norm_weight is not None:
        use["BK"] = triton.next_power_of_2(K)
    y = x.new_empty(1, N, dtype=dtype if y_scale is None else FP8)

    def given(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    wrap(gemv_kernel)[(triton.cdiv(N, use["BN"]),)](
        x, weight, given(x_scale), given(w_scale), given(bias), given(norm_weight), given(residual), given(y_scale),
        y=y, N=N, eps=norm_eps, K=K, NORM=norm_weight is not None, SILU=silu,
        QUANTISE=x_scale is not None and x.dtype != FP8, SCALED=x_scale is not None, BIASED=bias is not None,
        GATED=gated, RESIDUAL=residual is not None, CODES=y_scale is not None, GDC=gdc(), **ahead_of(ahead, x), **use,
    )  # fmt: skip
    return y


@torch.library.custom_op("jet::gemv_cpu", mutates_args=())
def gemv_cpu(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    norm_eps: float,
    silu: bool,
    gated: bool,
    dtype: torch.dtype,
    ahead: list[Tensor],
) -> Tensor:
    return gemv_ref(
        x, weight, x_scale, w_scale, bias, norm_weight, residual, y_scale, norm_eps, silu, gated, dtype
    )  # fmt: skip


@gemv_cpu.register_fake
def _(x, weight, x_scale, w_scale, bias, norm_weight, residual, y_scale, norm_eps, silu, gated, dtype, ahead):
    return x.new_empty(1, weight.shape[0] // (2 if gated else 1), dtype=dtype if y_scale is None else FP8)


@triton_op("jet::gemv", mutates_args=())
def gemv(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    norm_eps: float,
    silu: bool,
    gated: bool,
    dtype: torch.dtype,
    ahead: list[Tensor],
) -> Tensor:
    """[1, N]; arguments as `gemv_ref`, see the module's equations; `ahead` as `gemv_triton`."""
    if x.device.type == "cpu":
        return torch.ops.jet.gemv_cpu(
            x, weight, x_scale, w_scale, bias, norm_weight, residual, y_scale, norm_eps, silu, gated, dtype, ahead
        )
    if residual is not None:
        residual = residual.contiguous()
    return gemv_triton(
        x.contiguous(), weight, x_scale, w_scale, bias, norm_weight, residual, y_scale, norm_eps, silu, gated, dtype,
        ahead,
    )  # fmt: skip
