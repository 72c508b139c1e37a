"""Flash attention of ragged sequences over the paged cache, after `rope_append`: the prefill form of jet::attention.

A program owns BM rows of one key/value head of one sequence; row r is query head r % G of token r // G (G = Hq / Hkv),
so that a key or value tile serves all the query heads that read it. Over tiles of BN keys, with s2 = scale * log2(e):

    m' = max(m, s2 * max_j q.k_j);  p_j = exp2(s2 * q.k_j - m');  a = exp2(m - m')
    l = a * l + sum_j p_j;  acc = a * acc + p @ v;  o = acc / l

fp32 accumulators and statistics; bf16 or fp16 operands of the products, or IEEE fp32 for an fp32 model. Tiles before
every row's window are skipped. Only the tiles at the window's edge and on the diagonal are masked; there the loads also
skip cache entries that were never written. With MIXED the sequences of one token are left to the decode kernels.

Source: FlashAttention-2, arXiv 2307.08691. The reference is `attention.attention_ref`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.common import clamp, dot_precision, fp32, num_chunks, sequence_bounds, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.rope_append import check_layout, context_of, find_sequence, load_rope, rope_append_triton

LOG2E = 1.4426950408889634


class PrefillConfig(NamedTuple):
    BM: int  # rows (token x query head) of a program
    BN: int  # keys of a tile, at most a page
    num_warps: int
    num_stages: int


def prefill_config(head_dim: int, group: int, dtype: torch.dtype, cache_dtype: torch.dtype, page: int) -> PrefillConfig:
    """From the table (configs.py); group: query heads per key/value head. A tile is at most a page."""
    use = lookup("attention_prefill", head_dim=head_dim, group=group, dtype=dtype, cache_dtype=cache_dtype)
    return PrefillConfig(**{**use, "BN": min(page, use["BN"])})


@triton.jit
def page_of(p_table, j, hi, M, pages, PAGE: tl.constexpr):
    """The page of position j < hi, clamped to the pages that the cache has; entries beyond hi are not read."""
    return clamp(tl.load(p_table + (j // PAGE) % M, mask=j < hi, other=0), 0, pages - 1)


@triton.jit
def load_tile(p_tile, m_row, MASKED: tl.constexpr, DH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """[BN, BD] consecutive rows of a page; 0 beyond DH and, if MASKED, outside m_row."""
    o_d = tl.arange(0, BD)
    p = p_tile + tl.arange(0, BN)[:, None] * DH + o_d[None, :]
    if MASKED:
        return tl.load(p, mask=m_row[:, None] & (o_d < DH)[None, :], other=0.0)
    if BD != DH:
        return tl.load(p, mask=(o_d < DH)[None, :], other=0.0)
    return tl.load(p)


@triton.jit
def dot_operand(b_q, s2, FP8: tl.constexpr):
    """The queries as operands of the products, and the factor [BM] of their scores.

    FP8 converts to fp16 in one instruction, to bf16 in three: bf16 queries become fp16, scaled by a power of two.
    """
    b_s2 = tl.zeros([b_q.shape[0]], tl.float32) + fp32(s2)
    if FP8 and b_q.dtype == tl.bfloat16:
        b_x = b_q.to(tl.float32)
        b_e = tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(b_x), 1), 1e-30)))
        b_q = (b_x * tl.exp2(-b_e)[:, None]).to(tl.float16)
        b_s2 *= tl.exp2(b_e)
    return b_q, b_s2


@triton.jit
def softmax_step(b_s, b_s2, b_l, b_m):
    """Weights [BM, BN] of a tile's scores, the factor [BM] that rescales earlier sums, and the new sums and maxima."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * b_s2)
    b_e = tl.exp2(b_s * b_s2[:, None] - b_m_new[:, None])
    b_a = tl.exp2(b_m - b_m_new)
    return b_e, b_a, b_l * b_a + tl.sum(b_e, 1), b_m_new


@triton.jit
def attend_tiles(
    b_acc, b_l, b_m, b_q, b_s2, b_p, p_k, p_table, i_page, lo, hi, key_lo, key_hi, M, pages, stride_page, stride_kv,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, PAGE: tl.constexpr, DH: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One pass of the online softmax over the keys [lo, hi), lo a tile's first, in page i_page; b_p [BM]: positions."""
    o_n = tl.arange(0, BN)
    for j in tl.range(lo, hi, BN):
        p_tile = p_k + i_page.to(tl.int64) * stride_page + (j % PAGE) * DH
        # Loaded one tile early: the pipeliner would spend its stages on this load, which only feeds an address.
        i_page = page_of(p_table, j + BN, hi, M, pages, PAGE)
        m_key = (j + o_n >= key_lo) & (j + o_n < key_hi)
        b_k = load_tile(p_tile, m_key, MASKED, DH, BN, BD).to(b_q.dtype)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)  # [BM, BN]
        if MASKED:
            m_s = m_key[None, :] & ((j + o_n)[None, :] <= b_p[:, None])
            if WINDOW > 0:
                m_s = m_s & ((j + o_n)[None, :] > b_p[:, None] - WINDOW)
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_e, b_a, b_l, b_m = softmax_step(b_s, b_s2, b_l, b_m)
        b_v = load_tile(p_tile + stride_kv, m_key, MASKED, DH, BN, BD).to(b_q.dtype)
        b_acc = tl.dot(b_e.to(b_q.dtype), b_v, b_acc * b_a[:, None], input_precision=PREC)
    return b_acc, b_l, b_m


@triton.jit(do_not_specialize=["N", "T", "M", "P", "pages", "stride_table"])
def attention_prefill_kernel(
    qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, o,
    N, T, M, P, pages, s2, v_scale, stride_t, stride_table, stride_page, stride_kv, stride_h,
    HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, RD: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of a sequence first
    i_h = tl.program_id(1)
    i_n = find_sequence(cu_seqlens, i_block, N, G, BM)
    start, end = sequence_bounds(cu_seqlens, i_n, T)
    length = end - start
    first = (i_block - (start * G // BM + i_n)) * BM
    if (first < 0) | (first >= length * G) | (MIXED and length == 1):
        return

    o_r = first + tl.arange(0, BM)
    o_t, o_g = o_r // G, o_r % G
    m_r = o_t < length
    o_d = tl.arange(0, BD)
    p_o = o + (start + o_t).to(tl.int64) * (HQ * DH) + (i_h * G + o_g) * DH
    m_o = m_r[:, None] & (o_d < DH)[None, :]
    if tl.load(slots + i_n) < 0:
        tl.store(p_o[:, None] + o_d[None, :], tl.zeros([BM, BD], o.dtype.element_ty), mask=m_o)
        return

    context = context_of(context_lens, i_n, M, PAGE, WINDOW)
    p_min = context + first // G
    p_max = context + tl.minimum((first + BM - 1) // G, length - 1)
    hi = p_max + 1
    key_lo = 0
    mid_lo = 0  # [mid_lo, mid_hi): every row sees every key
    mid_hi = (p_min + 1) // BN * BN
    if WINDOW > 0:
        key_lo = tl.maximum(p_min - WINDOW + 1, 0)
        mid_lo = tl.minimum(tl.cdiv(tl.maximum(p_max - WINDOW + 1, 0), BN), tl.cdiv(hi, BN)) * BN
        mid_hi = tl.maximum(mid_hi, mid_lo)
    p_k = kv_cache + i_h * stride_h
    p_table = block_table + i_n.to(tl.int64) * stride_table
    lo = key_lo // BN * BN

    b_p = context + tl.minimum(o_t, length - 1)  # [BM]
    p_q = qkv + (start + o_t).to(tl.int64) * stride_t + (i_h * G + o_g) * DH
    b_q = load_rope(p_q, cos_sin + tl.minimum(b_p, P - 1).to(tl.int64) * RD, m_r, DH, RD, BD)  # [BM, BD]
    b_q, b_s2 = dot_operand(b_q, s2, kv_cache.dtype.element_ty == tl.float8e4nv)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], -1e30, tl.float32)  # finite, since a row may see no key of its first tile
    if WINDOW > 0:
        i_page = page_of(p_table, lo, mid_lo, M, pages, PAGE)
        b_acc, b_l, b_m = attend_tiles(
            b_acc, b_l, b_m, b_q, b_s2, b_p, p_k, p_table, i_page, lo, mid_lo, key_lo, hi, M, pages,
            stride_page, stride_kv, True, WINDOW, PAGE, DH, BN, BD, PREC,
        )  # fmt: skip
    i_page = page_of(p_table, mid_lo, mid_hi, M, pages, PAGE)
    b_acc, b_l, b_m = attend_tiles(
        b_acc, b_l, b_m, b_q, b_s2, b_p, p_k, p_table, i_page, mid_lo, mid_hi, key_lo, hi, M, pages,
        stride_page, stride_kv, False, WINDOW, PAGE, DH, BN, BD, PREC,
    )  # fmt: skip
    i_page = page_of(p_table, mid_hi, hi, M, pages, PAGE)
    b_acc, b_l, b_m = attend_tiles(
        b_acc, b_l, b_m, b_q, b_s2, b_p, p_k, p_table, i_page, mid_hi, hi, key_lo, hi, M, pages,
        stride_page, stride_kv, True, WINDOW, PAGE, DH, BN, BD, PREC,
    )  # fmt: skip
    b_o = b_acc * (fp32(v_scale) / b_l)[:, None]
    tl.store(p_o[:, None] + o_d[None, :], b_o.to(o.dtype.element_ty), mask=m_o)


def attention_prefill_triton(
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
    window: int,
    k_scale: float,
    v_scale: float,
    config: PrefillConfig | None = None,
    mixed: bool = False,
) -> Tensor:  # [T, Hq * Dh]
    """Append, then attend; correct for any split of the tokens into sequences.

    `mixed`: sequences of one token are left out, their rows of the result hold anything."""
    qkv = check_layout(qkv, kv_cache, head_dim)
    rope_append_triton(
        qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens,
        num_heads, num_kv_heads, head_dim, k_scale, v_scale, mixed,
    )  # fmt: skip
    fp8, page = kv_cache.dtype == torch.float8_e4m3fn, kv_cache.shape[3]
    group = num_heads // num_kv_heads
    BM, BN, num_warps, num_stages = config or prefill_config(head_dim, group, qkv.dtype, kv_cache.dtype, page)
    T, (N, M) = qkv.shape[0], block_table.shape
    o = qkv.new_empty(T, num_heads * head_dim)
    wrap(attention_prefill_kernel)[(num_chunks(T * (num_heads // num_kv_heads), N, BM), num_kv_heads)](
        qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, o,
        N, T, M, cos_sin.shape[0], kv_cache.shape[0],
        head_dim**-0.5 * LOG2E * (k_scale if fp8 else 1.0), v_scale if fp8 else 1.0,
        qkv.stride(0), block_table.stride(0), *kv_cache.stride()[:3],
        HQ=num_heads, HKV=num_kv_heads, DH=head_dim, RD=cos_sin.shape[1], BD=triton.next_power_of_2(head_dim),
        PAGE=page, WINDOW=window,
        BM=BM, BN=BN, PREC=dot_precision(qkv.dtype), MIXED=mixed,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return o
