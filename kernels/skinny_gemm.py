"""Linear layers of a few tokens, M = 2 to 128: every weight is read once, by programs that all fit the GPU at once.

    skinny_linear      y = (x W^T) x_scale w_scale + bias           sums in fp32, rounded
                       y = silu(y[:, :N/2]) * y[:, N/2:]            `gated`: W is [gate | up]; rounded twice
                       y = E4M3(y / y_scale)                        with y_scale: what the next FP8 layer multiplies
    skinny_partials    p_s = sum over the s-th of S parts of K of x W^T, fp32

x [M, K] and W [N, K], both in E4M3 with their scales [1], or both in the model dtype; E4M3(z) clamps to -448 .. 448.
The products are taken as W x^T: the outputs are the rows of the tensor cores' tiles, and the tokens their columns, of
which 16 are enough. Layers with few outputs (o_proj, down_proj) have too few tiles to fill a GPU, so their sums are cut
along K; the parts meet in the kernel that follows such a layer anyway: the residual sum with the next norm
(add_norm.py).

Launched by a programmatic edge (common.await_inputs) a program asks L2 for its weights before it waits for x.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.add_norm import scaled
from jet_export.kernels.common import acc_dtype, ahead_of, ask_ahead, await_inputs, dot_precision, gdc, i64, silu, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.gemv import FP8, codes, to_codes
from jet_export.kernels.triton_op import triton_op

MAX_ROWS = 128  # tokens of a call: the widest tile


def skinny_linear_ref(
    x: Tensor,  # [M, K], model dtype or float8_e4m3fn
    weight: Tensor,  # [N, K], the same dtype
    x_scale: Tensor | None,  # [1]
    w_scale: Tensor | None,  # [1]
    bias: Tensor | None,  # [N]
    y_scale: Tensor | None,  # [1]
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:  # [M, N], or [M, N / 2] if gated; dtype, or float8_e4m3fn with y_scale
    """The specification, in fp32 (fp64 for fp64 inputs)."""
    acc = acc_dtype(x.dtype)
    y = scaled(x.to(acc) @ weight.to(acc).t(), x_scale, w_scale, bias, dtype)
    if gated:
        gate, up = y.to(acc).chunk(2, -1)
        y = (F.silu(gate).to(dtype).to(acc) * up).to(dtype)
    return y if y_scale is None else to_codes(y.to(acc), y_scale)


def skinny_partials_ref(x: Tensor, weight: Tensor, splits: int) -> Tensor:  # [splits, M, N] fp32 (fp64)
    """The specification, but for where K is cut, which is the kernel's: only their sum over `splits` is."""
    acc, K = acc_dtype(x.dtype), x.shape[1]
    part = -(-K // splits)
    parts = [slice(s * part, (s + 1) * part) for s in range(splits)]
    return torch.stack([x[:, k].to(acc) @ weight[:, k].to(acc).t() for k in parts])


@triton.jit
def ask_for_weights(p_w, nbytes):
    """0 for each of the rows of weights p_w [BN], of whose next nbytes L2 has been asked for."""
    return tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [p_w.to(tl.int64), tl.zeros(p_w.shape, tl.int32) + nbytes], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def sums(
    p_w, p_up, p_x, o_k, m_n, m_m, first, last,
    K: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BN, BM] fp32: W x^T over columns first .. last, and if GATED of W_up too, with which x is read once.
    p_w, p_up [BN, 1], p_x [1, BM]: their rows."""
    # of E4M3 the tensor cores keep 14 bits of a sum: no more than 128 products are summed by them
    EXACT: tl.constexpr = BK if BK < 128 else 128
    b_y = tl.zeros([BN, BM], tl.float32)
    b_up = tl.zeros([BN, BM] if GATED else [1, 1], tl.float32)
    for i_k in tl.range(first, last, BK, num_stages=STAGES):
        m_w, m_x = m_n[:, None], m_m[None, :]
        if K % BK != 0:  # a mask along the rows would take the loads apart
            m_w, m_x = m_w & (i_k + o_k < K)[None, :], m_x & (i_k + o_k < K)[:, None]
        b_x = tl.load(p_x + (i_k + o_k)[:, None], mask=m_x, other=0.0)
        b_w = tl.load(p_w + (i_k + o_k)[None, :], mask=m_w, other=0.0)
        b_y = tl.dot(b_w, b_x, b_y, input_precision=PRECISION, max_num_imprecise_acc=EXACT)
        if GATED:
            b_w = tl.load(p_up + (i_k + o_k)[None, :], mask=m_w, other=0.0)
            b_up = tl.dot(b_w, b_x, b_up, input_precision=PRECISION, max_num_imprecise_acc=EXACT)
    return b_y, b_up


@triton.jit
def scaled_tile(b_y, x_scale, w_scale, bias, o_n, m_n, dtype: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """Sums [BN, BM] to outputs o_n, rounded, as fp32."""
    if SCALED:
        b_y *= tl.load(x_scale) * tl.load(w_scale)
    if BIASED:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    return b_y.to(dtype).to(tl.float32)


@triton.jit
def skinny_tile(
    x, weight, x_scale, w_scale, bias, y_scale, y, o_n, m_n, o_zero, first, last, M, N,
    K: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, CODES: tl.constexpr,
    PARTIAL: tl.constexpr, MODEL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs o_n of all M <= BM tokens."""
    dtype: tl.constexpr = tl.float32 if MODEL == "fp32" else tl.float16 if MODEL == "fp16" else tl.bfloat16
    o_m, o_k = tl.arange(0, BM), tl.arange(0, BK)
    m_m = o_m < M
    p_w = weight + (o_n + o_zero).to(tl.int64)[:, None] * K
    p_x = x + o_m[None, :] * K
    p_up = p_w + i64(N) * K
    b_y, b_up = sums(p_w, p_up, p_x, o_k, m_n, m_m, first, last, K, GATED, BM, BN, BK, STAGES, PRECISION)
    if not PARTIAL:
        b_y = scaled_tile(b_y, x_scale, w_scale, bias, o_n, m_n, dtype, SCALED, BIASED)
    if GATED:
        b_up = scaled_tile(b_up, x_scale, w_scale, bias + N, o_n, m_n, dtype, SCALED, BIASED)
        b_y = (silu(b_y).to(dtype).to(tl.float32) * b_up).to(dtype).to(tl.float32)
    if CODES:
        b_y = codes(b_y, tl.load(y_scale))
    p_y = y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y, tl.trans(b_y).to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
    x, weight, x_scale, w_scale, bias, y_scale, ahead, ahead_more, y, M, N,
    K: tl.constexpr, PART: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr,
    CODES: tl.constexpr, PARTIAL: tl.constexpr, MODEL: tl.constexpr, GDC: tl.constexpr, AHEAD: tl.constexpr,
    AHEAD_MORE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BN outputs, parts of K). N: outputs, half the rows of W if GATED. A program takes all tokens, in
    the narrowest tile that holds them, so that weights are read once. MODEL: the model dtype. AHEAD, AHEAD_MORE: bytes
    of other weights that L2 is asked for."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    first = tl.program_id(1) * PART
    last = tl.minimum(first + PART, K)
    o_zero = tl.zeros([BN], tl.int32)
    if GDC and K * weight.dtype.element_ty.primitive_bitwidth % 128 == 0:
        nbytes = tl.maximum(last - first, 0) * (weight.dtype.element_ty.primitive_bitwidth // 8)
        p_w = weight + tl.where(m_n, o_n, 0).to(tl.int64) * K + tl.minimum(first, K - K % 16)
        o_zero = ask_for_weights(p_w, nbytes)
        if GATED:
            o_zero += ask_for_weights(p_w + i64(N) * K, nbytes)
    i_program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    o_zero += ask_ahead(ahead, ahead_more, i_program, tl.num_programs(0) * tl.num_programs(1), AHEAD, AHEAD_MORE)
    x += await_inputs(GDC) * 16  # known to be a multiple: x stays aligned
    if PARTIAL:
        y += tl.program_id(1).to(tl.int64) * M * N
    if M <= 16:
        skinny_tile(
            x, weight, x_scale, w_scale, bias, y_scale, y, o_n, m_n, o_zero, first, last, M, N,
            K, SCALED, BIASED, GATED, CODES, PARTIAL, MODEL, 16, BN, BK, STAGES, PRECISION,
        )  # fmt: skip
    elif M <= 32:
        skinny_tile(
            x, weight, x_scale, w_scale, bias, y_scale, y, o_n, m_n, o_zero, first, last, M, N,
            K, SCALED, BIASED, GATED, CODES, PARTIAL, MODEL, 32, BN, BK, STAGES, PRECISION,
        )  # fmt: skip
    elif M <= 64:
        skinny_tile(
            x, weight, x_scale, w_scale, bias, y_scale, y, o_n, m_n, o_zero, first, last, M, N,
            K, SCALED, BIASED, GATED, CODES, PARTIAL, MODEL, 64, BN, BK, STAGES, PRECISION,
        )  # fmt: skip
    else:
        skinny_tile(
            x, weight, x_scale, w_scale, bias, y_scale, y, o_n, m_n, o_zero, first, last, M, N,
            K, SCALED, BIASED, GATED, CODES, PARTIAL, MODEL, 128, BN, BK, STAGES // 2 + 1, PRECISION,
        )  # fmt: skip


MODEL = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def configuration(weight: Tensor, gated: bool = False, split: bool = False) -> dict[str, int]:
    """From the table (configs.py); SPLITS: parts of K."""
    facts = {"out_features": weight.shape[0], "in_features": weight.shape[1], "gated": gated, "split": split}
    return lookup("skinny_gemm", dtype=weight.dtype, **facts)


def splits_of(weight: Tensor) -> int:
    """Into how many parts `skinny_partials` cuts the sums of a layer."""
    return configuration(weight, split=True)["SPLITS"]


def launch(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    y_scale: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
    y: Tensor,  # [M, N], or [splits, M, N]
    ahead: Sequence[Tensor],
) -> Tensor:
    """Launches the kernel, and returns y. x and weight are contiguous."""
    K, N = weight.shape[1], weight.shape[0] // (2 if gated else 1)
    partial = y.dim() == 3
    use = configuration(weight, gated, partial)
    use.pop("SPLITS")
    splits = y.shape[0] if partial else 1
    part = triton.cdiv(K, use["BK"] * splits) * use["BK"]
    given = [x if t is None else t for t in (x_scale, w_scale, bias, y_scale)]
    wrap(skinny_kernel)[(triton.cdiv(N, use["BN"]), splits)](
        x, weight, *given, y=y, M=x.shape[0], N=N, K=K, PART=part, SCALED=x_scale is not None, BIASED=bias is not None,
        GATED=gated, CODES=y_scale is not None, PARTIAL=partial, MODEL=MODEL[dtype], GDC=gdc(),
        PRECISION=dot_precision(x.dtype), **ahead_of(ahead, x), **use,
    )  # fmt: skip
    return y


def skinny_linear_triton(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    y_scale: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
    ahead: Sequence[Tensor] = (),
) -> Tensor:
    """Arguments as `skinny_linear_ref`, contiguous. ahead: up to two weights that the kernels behind this one read."""
    N = weight.shape[0] // (2 if gated else 1)
    y = x.new_empty(x.shape[0], N, dtype=dtype if y_scale is None else FP8)
    return launch(x, weight, x_scale, w_scale, bias, y_scale, gated, dtype, y, ahead)


def skinny_partials_triton(x: Tensor, weight: Tensor, splits: int, ahead: Sequence[Tensor] = ()) -> Tensor:
    """Arguments as `skinny_partials_ref`, contiguous; `ahead` as `skinny_linear_triton`."""
    y = x.new_empty(splits, x.shape[0], weight.shape[0], dtype=torch.float32)
    return launch(x, weight, None, None, None, None, False, torch.float32, y, ahead)


# The ops: the references on a CPU, where compilers must not look into them.


@torch.library.custom_op("jet::skinny_linear_cpu", mutates_args=())
def skinny_linear_cpu(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    y_scale: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
    ahead: list[Tensor],
) -> Tensor:
    return skinny_linear_ref(x, weight, x_scale, w_scale, bias, y_scale, gated, dtype)


@skinny_linear_cpu.register_fake
def _(x, weight, x_scale, w_scale, bias, y_scale, gated, dtype, ahead):
    N = weight.shape[0] // (2 if gated else 1)
    return x.new_empty(x.shape[0], N, dtype=dtype if y_scale is None else FP8)


@triton_op("jet::skinny_linear", mutates_args=())
def skinny_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    y_scale: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
    ahead: list[Tensor],
) -> Tensor:
    """Arguments as `skinny_linear_ref` and `skinny_linear_triton`; at most MAX_ROWS tokens."""
    if x.device.type == "cpu":
        return torch.ops.jet.skinny_linear_cpu(x, weight, x_scale, w_scale, bias, y_scale, gated, dtype, ahead)
    return skinny_linear_triton(x.contiguous(), weight, x_scale, w_scale, bias, y_scale, gated, dtype, ahead)


@torch.library.custom_op("jet::skinny_partials_cpu", mutates_args=())
def skinny_partials_cpu(x: Tensor, weight: Tensor, splits: int, ahead: list[Tensor]) -> Tensor:
    return skinny_partials_ref(x, weight, splits)


@skinny_partials_cpu.register_fake
def _(x, weight, splits, ahead):
    return x.new_empty(splits, x.shape[0], weight.shape[0], dtype=torch.float32)


@triton_op("jet::skinny_partials", mutates_args=())
def skinny_partials(x: Tensor, weight: Tensor, splits: int, ahead: list[Tensor]) -> Tensor:
    """Arguments as `skinny_partials_ref`, splits as `splits_of`; at most MAX_ROWS tokens."""
    if x.device.type == "cpu":
        return torch.ops.jet.skinny_partials_cpu(x, weight, splits, ahead)
    return skinny_partials_triton(x.contiguous(), weight, splits, ahead)
