"""Linear layer of one token: y = (W x) * x_scale * w_scale + bias, every weight read once.

x [1, K] and W [N, K] in one dtype, bf16, fp32 or E4M3; products and sums in fp32, one rounding. With one row of x the
product is bound by reading W (N K bytes in FP8), and tensor cores would idle; each program computes BN outputs.
x_scale, w_scale: the scales of an FP8 layer (model/fp8.py), [1] fp32, both or neither.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import acc_dtype, wrap
from jet_export.kernels.configs import lookup


def gemv_ref(
    x: Tensor,  # [1, K]
    weight: Tensor,  # [N, K]
    x_scale: Tensor | None,  # [1]
    w_scale: Tensor | None,  # [1]
    bias: Tensor | None,  # [N]
    out_dtype: torch.dtype,
) -> Tensor:  # [1, N]
    """The specification, in fp32 (fp64 for fp64 inputs)."""
    acc = acc_dtype(x.dtype)
    y = x.to(acc) @ weight.to(acc).t()
    if x_scale is not None and w_scale is not None:
        y = y * (x_scale * w_scale)
    return (y if bias is None else y + bias.to(acc)).to(out_dtype)


@triton.jit
def gemv_kernel(
    x, weight, x_scale, w_scale, bias, y, N, K: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BN rows)."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_n = (o_n < N)[:, None]
    p_w = weight + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    b_acc = tl.zeros([BN, BK], tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        if K % BK == 0:
            b_w = tl.load(p_w + i_k, mask=m_n, other=0.0)
            b_x = tl.load(x + i_k + o_k)
        else:
            m_k = i_k + o_k < K
            b_w = tl.load(p_w + i_k, mask=m_n & m_k[None, :], other=0.0)
            b_x = tl.load(x + i_k + o_k, mask=m_k, other=0.0)
        b_acc += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
    b_y = tl.sum(b_acc, 1)
    if SCALED:
        b_y *= tl.load(x_scale) * tl.load(w_scale)
    if BIASED:
        b_y += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(y + o_n, b_y.to(y.dtype.element_ty), mask=o_n < N)


def gemv_triton(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launches the kernel; arguments as `gemv_ref`, contiguous."""
    N, K = weight.shape
    use = lookup("gemv", dtype=weight.dtype, out_features=N, in_features=K)
    y = x.new_empty(1, N, dtype=out_dtype)
    wrap(gemv_kernel)[(triton.cdiv(N, use["BN"]),)](
        x, weight, x if x_scale is None else x_scale, x if w_scale is None else w_scale, x if bias is None else bias,
        y, N, K=K, SCALED=x_scale is not None, BIASED=bias is not None, **use,
    )  # fmt: skip
    return y


@torch.library.custom_op("jet::gemv_cpu", mutates_args=())
def gemv_cpu(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return gemv_ref(x, weight, x_scale, w_scale, bias, out_dtype)


@gemv_cpu.register_fake
def _(x, weight, x_scale, w_scale, bias, out_dtype):
    return x.new_empty(1, weight.shape[0], dtype=out_dtype)


@torch.library.triton_op("jet::gemv", mutates_args=())
def gemv(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[1, N] in out_dtype. See the module's equation."""
    if x.device.type == "cpu":
        return torch.ops.jet.gemv_cpu(x, weight, x_scale, w_scale, bias, out_dtype)
    return gemv_triton(x.contiguous(), weight, x_scale, w_scale, bias, out_dtype)
