"""Rotary embedding, and appending the roped keys and the values of ragged sequences to a paged cache.

    rope(x, p)[d] = x[d] * cos[p, d % half] + sign * x[(d + half) % R] * sin[p, d % half]   (d < R; x[d] beyond)
    half = R / 2, sign = -1 if d < half else 1; R: the columns of the rotary table, Dh or fewer
    cache[page, 0, :, p % page] = rope(k, p) / k_scale,  cache[page, 1, :, p % page] = v / v_scale,
    page = block_table[n, (p // page) % M]

Each product and the sum are rounded in the model dtype, as torch does. The reference is `attention.attention_ref`.

Ragged sequences are cut into blocks of BLOCK rows, G rows per token. Sequence n owns the blocks from
`cu_seqlens[n] * G // BLOCK + n` on, so T * G // BLOCK + N programs always suffice, a bound that the host knows from
sizes alone. A program finds its sequence by bisection, and returns if its block lies beyond the sequence's end.
"""

import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import clamp, fp32, num_chunks, sequence_bounds, wrap
from jet_export.kernels.configs import lookup

FP8_MAX: tl.constexpr = tl.constexpr(448.0)  # largest finite float8_e4m3fn
LAST_POSITION: tl.constexpr = tl.constexpr(1 << 30)  # keeps sums with positions within 32 bits


@triton.jit
def find_sequence(cu_seqlens, i_block, N, G: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence that owns this block (see the module)."""
    lo = 0
    hi = N
    while hi - lo > 1:
        mid = (lo + hi) // 2
        first = tl.load(cu_seqlens + mid) * G // BLOCK + mid
        lo = tl.where(first <= i_block, mid, lo)
        hi = tl.where(first <= i_block, hi, mid)
    return lo


@triton.jit
def context_of(context_lens, i_n, M, PAGE: tl.constexpr, WINDOW: tl.constexpr):
    """The tokens that a sequence holds, clamped to what its block-table row covers; with a window, any number."""
    held = tl.load(context_lens + i_n)
    if WINDOW > 0:
        return clamp(held, 0, LAST_POSITION)
    return clamp(held, 0, M * PAGE)


@triton.jit
def load_rope(p_x, p_cos_sin, m_row, DH: tl.constexpr, RD: tl.constexpr, BD: tl.constexpr):
    """rope(x) of the first RD columns of the rows at p_x [BT] with the table rows at p_cos_sin [BT], and the others as
    they are; 0 where masked: [BT, BD]."""
    HALF: tl.constexpr = RD // 2
    o_d = tl.arange(0, BD)
    m = m_row[:, None] & (o_d < DH)[None, :]
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m, other=0.0)
    dtype = b_x.dtype
    b_x = b_x.to(tl.float32)
    if RD < DH:  # beyond RD, x is multiplied by 1 and nothing is added
        m = m & (o_d < RD)[None, :]
    b_partner = tl.load(p_x[:, None] + ((o_d + HALF) % RD)[None, :], mask=m, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos_sin[:, None] + (o_d % HALF)[None, :], mask=m, other=1.0).to(tl.float32)
    b_sin = tl.load(p_cos_sin[:, None] + (o_d % HALF + HALF)[None, :], mask=m, other=0.0).to(tl.float32)
    b_1 = (b_x * b_cos).to(dtype).to(tl.float32)
    b_2 = (b_partner * b_sin).to(dtype).to(tl.float32)
    return (b_1 + tl.where(o_d < HALF, -b_2, b_2)).to(dtype)


@triton.jit
def quantize(b_x, scale, dtype: tl.constexpr):
    """b_x in the cache's dtype; the division is IEEE, so that FP8 codes equal torch's."""
    if dtype == tl.float8e4nv:
        b_x = tl.minimum(tl.maximum(tl.div_rn(b_x.to(tl.float32), fp32(scale)), -FP8_MAX), FP8_MAX)
    return b_x.to(dtype)


@triton.jit(do_not_specialize=["N", "T", "M", "P", "pages", "stride_table"])
def rope_append_kernel(
    qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens,
    N, T, M, P, pages, k_scale, v_scale, stride_t, stride_table, stride_page, stride_kv, stride_h,
    HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, RD: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    i_block, i_h = tl.program_id(0), tl.program_id(1)
    i_n = find_sequence(cu_seqlens, i_block, N, 1, BT)
    start, end = sequence_bounds(cu_seqlens, i_n, T)
    length = end - start
    first = (i_block - (start // BT + i_n)) * BT
    if (first < 0) | (first >= length) | (tl.load(slots + i_n) < 0) | (MIXED and length == 1):
        return

    o_t = first + tl.arange(0, BT)  # token of the sequence
    m_t = o_t < length
    p = clamp(tl.load(context_lens + i_n), 0, LAST_POSITION) + o_t
    p_row = qkv + (start + o_t).to(tl.int64) * stride_t
    p_cos_sin = cos_sin + tl.minimum(p, P - 1).to(tl.int64) * RD
    b_k = load_rope(p_row + (HQ + i_h) * DH, p_cos_sin, m_t, DH, RD, BD)  # [BT, BD]
    o_d = tl.arange(0, BD)
    m = m_t[:, None] & (o_d < DH)[None, :]
    b_v = tl.load((p_row + (HQ + HKV + i_h) * DH)[:, None] + o_d[None, :], mask=m, other=0.0)

    i_page = tl.load(block_table + i_n.to(tl.int64) * stride_table + (p // PAGE) % M, mask=m_t, other=0)
    i_page = clamp(i_page, 0, pages - 1).to(tl.int64)
    p_k = kv_cache + i_page * stride_page + i_h * stride_h + (p % PAGE) * DH  # [BT]
    dtype = kv_cache.dtype.element_ty
    tl.store(p_k[:, None] + o_d[None, :], quantize(b_k, k_scale, dtype), mask=m)
    tl.store((p_k + stride_kv)[:, None] + o_d[None, :], quantize(b_v, v_scale, dtype), mask=m)


def check_layout(qkv: Tensor, kv_cache: Tensor, head_dim: int) -> Tensor:
    """qkv with contiguous rows; raises ValueError for a cache or head_dim that the kernels cannot address."""
    page = kv_cache.shape[3]
    if page < 16 or page & (page - 1):
        raise ValueError(f"kv_cache has pages of {page} tokens: a power of two, 16 or more, is needed")
    if head_dim % 16 or head_dim > 256 or kv_cache.shape[4] != head_dim:
        raise ValueError(f"head_dim {head_dim} (cache: {kv_cache.shape[4]}) must be a multiple of 16, at most 256")
    if kv_cache.stride(4) != 1 or kv_cache.stride(3) != head_dim:
        raise ValueError("kv_cache must be contiguous within a page")
    return qkv if qkv.stride(1) == 1 else qkv.contiguous()


def rope_append_triton(
    qkv: Tensor,  # [T, (Hq + 2 Hkv) * Dh]
    cos_sin: Tensor,  # [P, R]
    kv_cache: Tensor,  # [pages, 2, Hkv, page, Dh]; updated in place
    block_table: Tensor,  # [N, M] int32
    cu_seqlens: Tensor,  # [N + 1] int32
    slots: Tensor,  # [N] int32
    context_lens: Tensor,  # [N] int32
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    k_scale: float,
    v_scale: float,
    mixed: bool = False,
) -> None:
    """Append the keys (after RoPE) and values of every sequence that is not padding; `mixed`: nor of one token."""
    use = lookup("rope_append", head_dim=head_dim, dtype=qkv.dtype, cache_dtype=kv_cache.dtype)
    N, M = block_table.shape
    wrap(rope_append_kernel)[(num_chunks(qkv.shape[0], N, use["BT"]), num_kv_heads)](
        qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens,
        N, qkv.shape[0], M, cos_sin.shape[0], kv_cache.shape[0], k_scale, v_scale,
        qkv.stride(0), block_table.stride(0), *kv_cache.stride()[:3],
        HQ=num_heads, HKV=num_kv_heads, DH=head_dim, RD=cos_sin.shape[1], BD=triton.next_power_of_2(head_dim),
        PAGE=kv_cache.shape[3], MIXED=mixed, **use,
    )  # fmt: skip
