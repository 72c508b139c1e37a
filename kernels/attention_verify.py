"""A few new tokens of each sequence over the paged cache, split over the keys: the form VERIFY of jet::attention.

`rope_append` first appends all tokens. Program (split, key/value head and block, sequence) owns BM rows, row r being
query head r % G of token r // G as in attention_prefill.py, and a share of the tiles of keys that those rows see; it
writes o_s and lse_s of its share as in attention_decode.py, lse_s = -inf where a row sees none of it. A second kernel
combines the splits of each token. Causal among the tokens. The reference is `attention.attention_ref`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.attention_decode import DecodeConfig, decode_config, num_sms, num_splits
from jet_export.kernels.attention_prefill import LOG2E, attend_tiles, dot_operand, page_of
from jet_export.kernels.common import dot_precision, fp32, sequence_bounds, wrap
from jet_export.kernels.form import MAX_VERIFY
from jet_export.kernels.rope_append import check_layout, context_of, load_rope, rope_append_triton

BLOCK_ROWS = 32  # token x query head: of a program


@triton.jit(do_not_specialize=["T", "splits", "M", "P", "pages", "stride_table"])
def attention_verify_kernel(
    qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, o_s, lse_s,
    T, splits, M, P, pages, s2, stride_t, stride_table, stride_page, stride_kv, stride_h,
    HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, RD: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (splits, HKV * BLOCKS, N); TOKENS: the most tokens of a sequence."""
    G: tl.constexpr = HQ // HKV
    i_s, i_n = tl.program_id(0), tl.program_id(2)
    i_h, first = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS * BM
    start, end = sequence_bounds(cu_seqlens, i_n, T)
    length = tl.minimum(end - start, TOKENS)
    if (tl.load(slots + i_n) < 0) | (first >= length * G):
        return
    o_r = first + tl.arange(0, BM)
    o_t, o_g = o_r // G, o_r % G
    m_r = o_t < length
    o_d = tl.arange(0, BD)
    context = context_of(context_lens, i_n, M, PAGE, WINDOW)
    p_min = context + first // G
    hi = context + tl.minimum((first + BM - 1) // G, length - 1) + 1
    key_lo = 0
    if WINDOW > 0:
        key_lo = tl.maximum(p_min - WINDOW + 1, 0)
    tile_lo, tile_hi = key_lo // BN, tl.cdiv(hi, BN)
    per_split = tl.cdiv(tile_hi - tile_lo, splits)
    tile = tile_lo + i_s * per_split
    lo, hi = tile * BN, tl.minimum((tile + per_split) * BN, hi)

    b_p = context + tl.minimum(o_t, length - 1)  # [BM]
    p_q = qkv + (start + o_t).to(tl.int64) * stride_t + (i_h * G + o_g) * DH
    b_q = load_rope(p_q, cos_sin + tl.minimum(b_p, P - 1).to(tl.int64) * RD, m_r, DH, RD, BD)  # [BM, BD]
    b_q, b_s2 = dot_operand(b_q, s2, kv_cache.dtype.element_ty == tl.float8e4nv)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], -1e30, tl.float32)  # finite, since a row may see no key of a tile
    p_table = block_table + i_n.to(tl.int64) * stride_table
    i_page = page_of(p_table, lo, hi, M, pages, PAGE)
    b_acc, b_l, b_m = attend_tiles(
        b_acc, b_l, b_m, b_q, b_s2, b_p, kv_cache + i_h * stride_h, p_table, i_page, lo, hi, key_lo, hi, M, pages,
        stride_page, stride_kv, True, WINDOW, PAGE, DH, BN, BD, PREC,
    )  # fmt: skip
    i_row = ((start + o_t).to(tl.int64) * HQ + i_h * G + o_g) * splits + i_s
    b_o = b_acc / tl.where(b_l > 0, b_l, 1.0)[:, None]
    tl.store(o_s + i_row[:, None] * DH + o_d[None, :], b_o, mask=m_r[:, None] & (o_d < DH)[None, :])
    tl.store(lse_s + i_row, tl.where(b_l > 0, b_m + tl.log2(tl.maximum(b_l, 1e-30)), float("-inf")), mask=m_r)


@triton.jit
def sequence_of(cu_seqlens, i_t, N):
    """The last sequence that begins at token i_t or before."""
    lo = i_t * 0
    hi = lo + N
    while hi - lo > 1:
        mid = (lo + hi) // 2
        before = tl.load(cu_seqlens + mid) <= i_t
        lo = tl.where(before, mid, lo)
        hi = tl.where(before, hi, mid)
    return lo


@triton.jit(do_not_specialize=["N", "T", "splits"])
def combine_tokens_kernel(
    o_s, lse_s, cu_seqlens, slots, o, N, T, splits, v_scale,
    HQ: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (columns of a head, HQ, T). Zero for the tokens of padding rows."""
    i_d, i_h, i_t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n = sequence_of(cu_seqlens, i_t, N)
    start, end = sequence_bounds(cu_seqlens, i_n, T)
    live = (tl.load(slots + i_n) >= 0) & (i_t >= start) & (i_t < tl.minimum(end, start + TOKENS))
    i_row = i_t.to(tl.int64) * HQ + i_h
    o_d, o_i = i_d * BD + tl.arange(0, BD), tl.arange(0, BS)
    b_acc = tl.zeros([BD], tl.float32)
    b_l = 0.0
    b_m = -1e30
    for i in range(0, tl.where(live, splits, 0), BS):
        b_lse = tl.load(lse_s + i_row * splits + i + o_i, mask=i + o_i < splits, other=float("-inf"))
        p_o = o_s + (i_row * splits + i + o_i)[:, None] * DH + o_d[None, :]
        b_o = tl.load(p_o, mask=(b_lse > float("-inf"))[:, None] & (o_d < DH)[None, :], other=0.0)
        b_m_new = tl.maximum(b_m, tl.max(b_lse, 0))
        b_w = tl.exp2(b_lse - b_m_new)
        b_a = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_a + tl.sum(b_w, 0)
        b_acc = b_acc * b_a + tl.sum(b_w[:, None] * b_o, 0)
        b_m = b_m_new
    b_o = b_acc * (fp32(v_scale) / tl.where(b_l > 0, b_l, 1.0))
    tl.store(o + i_row * DH + o_d, b_o.to(o.dtype.element_ty), mask=o_d < DH)


def attention_verify_triton(
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
    config: DecodeConfig | None = None,
) -> Tensor:  # [T, Hq * Dh]
    """Append and attend, at most MAX_VERIFY tokens a sequence. Tiles as those of the decode form."""
    qkv = check_layout(qkv, kv_cache, head_dim)
    rope_append_triton(
        qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens,
        num_heads, num_kv_heads, head_dim, k_scale, v_scale,
    )  # fmt: skip
    fp8, page = kv_cache.dtype == torch.float8_e4m3fn, kv_cache.shape[3]
    group = num_heads // num_kv_heads
    BN, num_warps, num_stages, per_sm = config or decode_config(head_dim, group, qkv.dtype, kv_cache.dtype, page)
    T, (N, M) = qkv.shape[0], block_table.shape
    keys = torch.sym_min(M * page, window + MAX_VERIFY) if window else M * page
    splits = num_splits(N, num_kv_heads, keys, num_sms(qkv.device), per_sm)
    o_s = qkv.new_empty((T, num_heads, splits, head_dim), dtype=torch.float32)
    lse_s = qkv.new_empty((T, num_heads, splits), dtype=torch.float32)
    o = qkv.new_empty(T, num_heads * head_dim)
    blocks = triton.cdiv(MAX_VERIFY * group, BLOCK_ROWS)
    wrap(attention_verify_kernel)[(splits, num_kv_heads * blocks, N)](
        qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, o_s, lse_s,
        T, splits, M, cos_sin.shape[0], kv_cache.shape[0], head_dim**-0.5 * LOG2E * (k_scale if fp8 else 1.0),
        qkv.stride(0), block_table.stride(0), *kv_cache.stride()[:3],
        HQ=num_heads, HKV=num_kv_heads, DH=head_dim, RD=cos_sin.shape[1], BD=triton.next_power_of_2(head_dim),
        PAGE=page, WINDOW=window,
        TOKENS=MAX_VERIFY, BLOCKS=blocks, BM=BLOCK_ROWS, BN=BN, PREC=dot_precision(qkv.dtype),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    wrap(combine_tokens_kernel)[(triton.cdiv(head_dim, 32), num_heads, T)](
        o_s, lse_s, cu_seqlens, slots, o, N, T, splits, v_scale if fp8 else 1.0,
        HQ=num_heads, DH=head_dim, BD=32, BS=64, TOKENS=MAX_VERIFY, num_warps=4,
    )  # fmt: skip
    return o
