"""What the programs of jet::linear_chain do (linear_chain.py): layers cut into pieces, and barriers between them."""

import triton
import triton.language as tl

from jet_export.kernels.common import ask_share, await_inputs, fp32, i64
from jet_export.kernels.gemv import codes, factors, store_outputs


@triton.jit
def wait_for_all(barrier, i_wait, n):
    """Every program's stores before its i_wait-th call (from 1 on) are seen by every program's loads after it. barrier:
    [1] int32, 0 at the launch."""
    tl.debug_barrier()
    tl.atomic_add(barrier, 1, sem="release", scope="gpu")
    while tl.atomic_add(barrier, 0, sem="acquire", scope="gpu") < i_wait * n:
        pass
    tl.debug_barrier()


@triton.jit
def weight_piece(weight, i, n, q: tl.constexpr, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] of W [N, K], zero outside: the q-th piece that a program reads from tile i on, a warp a row. A tile is
    ceil(K / BK) pieces; the program's next tile is n further on."""
    PIECES: tl.constexpr = (K + BK - 1) // BK
    o_n = (i + (q // PIECES) * n) * BN + tl.arange(0, BN)
    o_k = (q % PIECES) * BK + tl.arange(0, BK)
    m_w = (o_n < N)[:, None]
    if K % BK:
        m_w = m_w & (o_k < K)[None, :]
    return tl.load(weight + i64(o_n)[:, None] * K + o_k[None, :], mask=m_w, other=0.0)


@triton.jit
def first_pieces(weight, i, n, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD pieces, a tuple."""
    pieces = ()
    for q in tl.static_range(AHEAD):
        pieces = pieces + (weight_piece(weight, i, n, q, N, K, BN, BK),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def moved_on(pieces, piece, AHEAD: tl.constexpr):
    """The pieces without the first one, and one more."""
    out = ()
    for q in tl.static_range(1, AHEAD):
        out = out + (pieces[q],)  # type: ignore[assignment]  # noqa: RUF005
    return out + (piece,)  # noqa: RUF005


@triton.jit
def input_piece(x, k: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK]: columns of x, a copy for each row, in the layout of the weights."""
    o_k = k * BK + tl.arange(0, BK)[None, :] + tl.zeros([BN, 1], tl.int32)
    if K % BK:
        return tl.load(x + o_k, mask=o_k < K, other=0.0)
    return tl.load(x + o_k)


@triton.jit
def first_inputs(x, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD pieces of x, a tuple."""
    pieces = ()
    for k in tl.static_range(AHEAD):
        pieces = pieces + (input_piece(x, k, K, BN, BK),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def normed_inputs(
    x, norm_weight, rstd, scale, K: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, QUANTISE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """All of x, normed (or SiLU of it) and quantised, in pieces of [BK]: a tuple."""
    pieces = ()
    for k in tl.static_range((K + BK - 1) // BK):
        o_k = k * BK + tl.arange(0, BK)
        b_a = factors(x, norm_weight, o_k, o_k < K, rstd, scale, NORM, SILU, QUANTISE)
        pieces = pieces + (b_a,)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def normed_layer(
    x, weight, x_scale, w_scale, bias, norm_weight, y_scale, y, b_w, b_up, N, eps, i, n,
    K: tl.constexpr, dtype: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, QUANTISE: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, CODES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program i's part of a layer of few inputs, which it norms (or takes SiLU of), quantises and keeps. b_w, and of a
    gated layer b_up: the first AHEAD pieces of its weights."""
    PIECES: tl.constexpr = (K + BK - 1) // BK
    scale = 1.0
    if QUANTISE:
        scale = tl.load(x_scale)
    rstd = 1.0
    if NORM:
        square = tl.zeros([BK], tl.float32)
        for k in tl.static_range(PIECES):
            o_k = k * BK + tl.arange(0, BK)
            b_x = tl.load(x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
            square += b_x * b_x
        rstd = tl.rsqrt(tl.sum(square, 0) / K + fp32(eps))
    inputs = normed_inputs(x, norm_weight, rstd, scale, K, NORM, SILU, QUANTISE, BK)
    for i_tile in range(i, tl.cdiv(N, BN), n):
        b_y = tl.zeros([BN, BK], tl.float32)
        b_y_up = b_y
        for k in tl.static_range(PIECES):
            later = weight_piece(weight, i_tile, n, k + AHEAD, N, K, BN, BK)
            b_y += b_w[0].to(tl.float32) * inputs[k][None, :]
            b_w = moved_on(b_w, later, AHEAD)
            if GATED:
                later = weight_piece(weight + i64(N) * K, i_tile, n, k + AHEAD, N, K, BN, BK)
                b_y_up += b_up[0].to(tl.float32) * inputs[k][None, :]
                b_up = moved_on(b_up, later, AHEAD)
        store_outputs(
            tl.sum(b_y, 1), tl.sum(b_y_up, 1), x_scale, w_scale, bias, x, y_scale, y, i_tile, N, dtype, SCALED, BIASED,
            GATED, False, CODES, BN,
        )  # fmt: skip


@triton.jit
def added_layer(
    x, weight, x_scale, w_scale, bias, residual, y, b_w, N, i, n,
    K: tl.constexpr, dtype: tl.constexpr, QUANTISE: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program i's part of a layer of many inputs and few outputs, which are added to a residual."""
    PIECES: tl.constexpr = (K + BK - 1) // BK
    tl.static_assert(AHEAD <= PIECES)
    scale = 1.0
    if QUANTISE:
        scale = tl.load(x_scale)
    b_x = first_inputs(x, K, BN, BK, AHEAD)
    for i_tile in range(i, tl.cdiv(N, BN), n):
        b_y = tl.zeros([BN, BK], tl.float32)
        for k in tl.static_range(PIECES):
            later = weight_piece(weight, i_tile, n, k + AHEAD, N, K, BN, BK)
            later_x = input_piece(x, (k + AHEAD) % PIECES, K, BN, BK)
            b_a = b_x[0].to(tl.float32)
            if QUANTISE:
                b_a = codes(b_a, scale).to(tl.float8e4nv).to(tl.float32)
            b_y += b_w[0].to(tl.float32) * b_a
            b_w = moved_on(b_w, later, AHEAD)
            b_x = moved_on(b_x, later_x, AHEAD)
        b_sum = tl.sum(b_y, 1)
        store_outputs(
            b_sum, b_sum, x_scale, w_scale, bias, residual, x_scale, y, i_tile, N, dtype, SCALED, BIASED, False, True,
            False, BN,
        )  # fmt: skip


@triton.jit
def linear_chain_kernel(
    x, residual, out_w, out_xs, out_ws, out_bias, norm1, up_w, up_xs, up_ws, up_bias, down_w, down_xs, down_ws,
    down_bias, norm2, in_w, in_xs, in_ws, in_bias, small_w, small_bias, gen_w, gen_xs, gen_ws, gen_bias,
    h1, m, h2, y, z, k, barrier, next_barrier, eps,
    D_O: tl.constexpr, D: tl.constexpr, D_M: tl.constexpr, N_IN: tl.constexpr, N_SMALL: tl.constexpr,
    N_GEN: tl.constexpr, R: tl.constexpr, OUT_FP8: tl.constexpr, UP_FP8: tl.constexpr, DOWN_FP8: tl.constexpr,
    IN_FP8: tl.constexpr, GEN_FP8: tl.constexpr, OUT_BIASED: tl.constexpr, UP_BIASED: tl.constexpr,
    DOWN_BIASED: tl.constexpr, IN_BIASED: tl.constexpr, SMALL_BIASED: tl.constexpr, GEN_BIASED: tl.constexpr,
    GDC: tl.constexpr, ASK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid (programs), all of them resident."""
    dtype: tl.constexpr = h1.dtype.element_ty
    i, n = tl.program_id(0), tl.num_programs(0)
    zero = 0
    if ASK:
        zero = ask_share(up_w, i, n, 2 * D_M * D * up_w.dtype.element_ty.primitive_bitwidth // 8)
    b_w = first_pieces(out_w, i + zero, n, D, D_O, BN, BK, AHEAD)
    if i == 0:
        tl.store(next_barrier, 0)
    zero = await_inputs(GDC) * 16  # known to be a multiple: x stays aligned
    added_layer(
        x + zero, out_w, out_xs, out_ws, out_bias, residual + zero, h1, b_w, D, i, n,
        D_O, dtype, OUT_FP8, OUT_FP8, OUT_BIASED, BN, BK, AHEAD,
    )  # fmt: skip

    zero = 0
    if ASK:
        zero = ask_share(down_w, i, n, D_M * D * down_w.dtype.element_ty.primitive_bitwidth // 8)
    b_w = first_pieces(up_w, i + zero, n, D_M, D, BN, BK, AHEAD)
    b_up = first_pieces(up_w + i64(D_M) * D, i, n, D_M, D, BN, BK, AHEAD)
    wait_for_all(barrier, 1, n)
    normed_layer(
        h1, up_w, up_xs, up_ws, up_bias, norm1, down_xs, m, b_w, b_up, D_M, eps, i, n,
        D, dtype, True, False, UP_FP8, UP_FP8, UP_BIASED, True, DOWN_FP8, BN, BK, AHEAD,
    )  # fmt: skip

    zero = 0
    if ASK:
        zero = ask_share(in_w, i, n, N_IN * D * in_w.dtype.element_ty.primitive_bitwidth // 8)
    b_w = first_pieces(down_w, i + zero, n, D, D_M, BN, BK, AHEAD)
    wait_for_all(barrier, 2, n)
    added_layer(
        m, down_w, down_xs, down_ws, down_bias, h1, h2, b_w, D, i, n,
        D_M, dtype, False, DOWN_FP8, DOWN_BIASED, BN, BK, AHEAD,
    )  # fmt: skip

    zero = 0
    if ASK and N_GEN:
        zero = ask_share(gen_w, i, n, N_GEN * R * gen_w.dtype.element_ty.primitive_bitwidth // 8)
    b_w = first_pieces(in_w, i + zero, n, N_IN, D, BN, BK, AHEAD)
    wait_for_all(barrier, 3, n)
    i_small = n - 1 - i  # by the last programs, which have fewer tiles of the others
    if i_small * BN < N_SMALL:
        b_small = first_pieces(small_w, i_small, n, N_SMALL, D, BN, BK, AHEAD)
        normed_layer(
            h2, small_w, in_xs, in_ws, small_bias, norm2, in_xs, z, b_small, b_small, N_SMALL, eps, i_small, n,
            D, dtype, True, False, False, False, SMALL_BIASED, False, False, BN, BK, AHEAD,
        )  # fmt: skip
    normed_layer(
        h2, in_w, in_xs, in_ws, in_bias, norm2, in_xs, y, b_w, b_w, N_IN, eps, i, n,
        D, dtype, True, False, IN_FP8, IN_FP8, IN_BIASED, False, False, BN, BK, AHEAD,
    )  # fmt: skip

    if N_GEN:
        b_w = first_pieces(gen_w, i, n, N_GEN, R, BN, BK, AHEAD)
        wait_for_all(barrier, 4, n)
        normed_layer(
            y + (N_IN - R), gen_w, gen_xs, gen_ws, gen_bias, norm2, gen_xs, k, b_w, b_w, N_GEN, eps, i, n,
            R, dtype, False, True, GEN_FP8, GEN_FP8, GEN_BIASED, False, False, BN, BK, AHEAD,
        )  # fmt: skip
