"""One new token a sequence over the paged cache, split over the keys: the decode form of jet::attention.

The keys before the new token, from the window's start on, are cut into tiles of BN keys, and the tiles evenly into at
most `splits` splits. Program (split, key/value head, sequence) reads its tiles once for all G = Hq / Hkv query heads
and writes

    o_s = sum_j exp2(s2 * q.k_j - m_s) v_j / l_s,    lse_s = m_s + log2(l_s)        s2 = scale * log2(e)

The last split also applies RoPE to the new key, appends it and its value to the cache, and starts its sum from them: no
other program reads that position, so the append needs no kernel of its own. A second kernel combines the splits:

    o = sum_s exp2(lse_s - max lse) o_s / sum_s exp2(lse_s - max lse)

`splits` depends on sizes alone (batch, heads, SMs, width of the block table); each context is divided among the splits
on the device. With MIXED the sequences may be longer: those of one token are decoded, the others are left to the
prefill kernels. Source: Flash-Decoding (Dao et al., 2023). The reference is `attention.attention_ref`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.attention_prefill import LOG2E, attend_tiles, dot_operand, load_tile, page_of, softmax_step
from jet_export.kernels.common import INTERPRETED, await_inputs, dot_precision, fp32, gdc, sequence_bounds, wrap
from jet_export.kernels.configs import lookup
from jet_export.kernels.rope_append import check_layout, context_of, load_rope, quantize


class DecodeConfig(NamedTuple):
    BN: int  # keys of a tile, at most a page
    num_warps: int
    num_stages: int
    programs_per_sm: int  # target of the number of splits for large batches


def decode_config(head_dim: int, group: int, dtype: torch.dtype, cache_dtype: torch.dtype, page: int) -> DecodeConfig:
    """From the table (configs.py); group: query heads per key/value head. A tile is at most a page."""
    use = lookup("attention_decode", head_dim=head_dim, group=group, dtype=dtype, cache_dtype=cache_dtype)
    return DecodeConfig(**{**use, "BN": min(page, use["BN"])})


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device that the op is traced for; an H100's if there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if torch.cuda.is_available() else 132


def num_splits(N, num_kv_heads: int, keys, sms: int, programs_per_sm: int):
    """Splits of a sequence of at most `keys` keys; N and keys may be symbolic.

    Several programs per SM keep it busy when lengths differ. Every split costs a program and a term of the sum, so
    beyond 16 splits per row there are at most two programs per SM. Each split has at least 128 keys.
    """
    rows = N * num_kv_heads
    splits = torch.sym_max(2 * sms // rows, torch.sym_min(programs_per_sm * sms // rows, 16))
    return torch.sym_max(1, torch.sym_min(splits, keys // 128))


@triton.jit
def tiles_of(p, splits, WINDOW: tl.constexpr, BN: tl.constexpr):
    """First key, first tile, end tile and tiles per split, for the keys before position p."""
    key_lo = 0
    if WINDOW > 0:
        key_lo = tl.maximum(p - WINDOW + 1, 0)
    tile_lo = key_lo // BN
    tile_hi = tl.cdiv(p, BN)
    return key_lo, tile_lo, tile_hi, tl.maximum(tl.cdiv(tile_hi - tile_lo, splits), 1)


@triton.jit
def unpack(b_x):
    """Convert pairs of FP8 numbers, given as 16 bits, to two fp16 tensors: the lower bytes and the upper ones.

    Tensor cores need neighbouring keys in one register. Loads from shared memory transpose in units of 16 bits; single
    bytes would be loaded one by one, which halves the speed of decoding.
    """
    if INTERPRETED:
        b_lo = (b_x & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        b_hi = (b_x >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return b_lo, b_hi
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 x0, x1;
        .reg .b32 y0, y1;
        mov.b32 {x0, x1}, $2;
        cvt.rn.f16x2.e4m3x2 y0, x0;
        cvt.rn.f16x2.e4m3x2 y1, x1;
        prmt.b32 $0, y0, y1, 0x5410;
        prmt.b32 $1, y0, y1, 0x7632;
        }""",
        "=r,=r,r", [b_x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def attend_fp8(
    b_acc, b_l, b_m, b_q, b_s2, p_k, p_table, i_page, lo, hi, key_lo, M, pages, stride_page, stride_kv,
    PAGE: tl.constexpr, DH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`attend_tiles` for an FP8 cache when all rows see the same keys; values are read in pairs (see `unpack`)."""
    o_n = tl.arange(0, BN)
    b_lo, b_hi = tl.split(tl.reshape(b_acc, [BM, BD // 2, 2]))
    for j in tl.range(lo, hi, BN):
        p_tile = p_k + i_page.to(tl.int64) * stride_page + (j % PAGE) * DH
        i_page = page_of(p_table, j + BN, hi, M, pages, PAGE)
        m_key = (j + o_n >= key_lo) & (j + o_n < hi)
        b_k = load_tile(p_tile, m_key, True, DH, BN, BD).to(b_q.dtype)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)
        b_s = tl.where(m_key[None, :], b_s, float("-inf"))
        b_e, b_a, b_l, b_m = softmax_step(b_s, b_s2, b_l, b_m)
        b_e = b_e.to(b_q.dtype)
        p_pairs = (p_tile + stride_kv).to(tl.pointer_type(tl.uint16))
        v_lo, v_hi = unpack(load_tile(p_pairs, m_key, True, DH // 2, BN, BD // 2))
        b_lo = tl.dot(b_e, v_lo.to(b_q.dtype), b_lo * b_a[:, None], input_precision=PREC)
        b_hi = tl.dot(b_e, v_hi.to(b_q.dtype), b_hi * b_a[:, None], input_precision=PREC)
    return tl.reshape(tl.join(b_lo, b_hi), [BM, BD]), b_l, b_m


@triton.jit
def only_token(cu_seqlens, i_n, T):
    """The row of a sequence's only token, int64; -1 if it has more."""
    bos, eos = sequence_bounds(cu_seqlens, i_n, T)
    return tl.where(eos - bos == 1, bos, -1).to(tl.int64)


@triton.jit(do_not_specialize=["T", "splits", "M", "P", "pages", "stride_table"])
def attention_decode_kernel(
    qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, o_s, lse_s,
    T, splits, M, P, pages, s2, k_scale, v_scale, stride_t, stride_table, stride_page, stride_kv, stride_h,
    HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, RD: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, MIXED: tl.constexpr,
    GDC: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HKV
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    i_n = (tl.program_id(2) + await_inputs(GDC)).to(tl.int64)
    p = context_of(context_lens, i_n, M, PAGE, WINDOW)
    key_lo, tile_lo, tile_hi, per_split = tiles_of(p, splits, WINDOW, BN)
    tile = tile_lo + i_s * per_split
    i_t = i_n
    if MIXED:
        i_t = only_token(cu_seqlens, i_n, T)
    if (i_t < 0) | (tl.load(slots + i_n) < 0) | ((i_s > 0) & (tile >= tile_hi)):
        return

    lo, hi = tile * BN, tl.minimum((tile + per_split) * BN, p)
    p_k = kv_cache + i_h * stride_h
    p_table = block_table + i_n * stride_table
    i_page = page_of(p_table, lo, hi, M, pages, PAGE)
    o_g, o_d = tl.arange(0, BM), tl.arange(0, BD)
    m_g = o_g < G
    p_row = qkv + i_t * stride_t
    p_cos_sin = cos_sin + tl.minimum(p, P - 1).to(tl.int64) * RD
    b_q = load_rope(p_row + (i_h * G + o_g) * DH, p_cos_sin + o_g * 0, m_g, DH, RD, BD)  # [BM, BD]
    b_q, b_s2 = dot_operand(b_q, s2, kv_cache.dtype.element_ty == tl.float8e4nv)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], -1e30, tl.float32)

    if tile + per_split >= tile_hi:  # the last split, which has the fewest tiles, adds the new token
        o_1 = tl.arange(0, 1)
        m_d = (o_d < DH)[None, :]
        dtype = kv_cache.dtype.element_ty
        b_k = load_rope(p_row + (HQ + i_h) * DH + o_1, p_cos_sin + o_1, o_1 == 0, DH, RD, BD)
        b_k = quantize(b_k, k_scale, dtype)
        b_v = tl.load(p_row + (HQ + HKV + i_h) * DH + o_1[:, None] + o_d[None, :], mask=m_d, other=0.0)
        b_v = quantize(b_v, v_scale, dtype)  # [1, BD]
        p_new = (
            p_k
            + page_of(p_table, p, p + 1, M, pages, PAGE).to(tl.int64) * stride_page
            + (p % PAGE) * DH
            + o_1[:, None]
            + o_d[None, :]
        )
        tl.store(p_new, b_k, mask=m_d)
        tl.store(p_new + stride_kv, b_v, mask=m_d)
        b_m = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1) * b_s2
        b_l += 1.0
        b_acc += b_v.to(tl.float32)

    if kv_cache.dtype.element_ty == tl.float8e4nv:
        b_acc, b_l, b_m = attend_fp8(
            b_acc, b_l, b_m, b_q, b_s2, p_k, p_table, i_page, lo, hi, key_lo, M, pages, stride_page, stride_kv,
            PAGE, DH, BN, BD, BM, PREC,
        )  # fmt: skip
    else:
        b_acc, b_l, b_m = attend_tiles(
            b_acc, b_l, b_m, b_q, b_s2, p + o_g * 0, p_k, p_table, i_page, lo, hi, key_lo, p, M, pages,
            stride_page, stride_kv, True, WINDOW, PAGE, DH, BN, BD, PREC,
        )  # fmt: skip
    i_row = (i_n * HQ + i_h * G + o_g) * splits + i_s
    p_o = o_s + i_row[:, None] * DH + o_d[None, :]
    tl.store(p_o, b_acc / b_l[:, None], mask=m_g[:, None] & (o_d < DH)[None, :])
    tl.store(lse_s + i_row, b_m + tl.log2(b_l), mask=m_g)


@triton.jit(do_not_specialize=["T", "splits", "M"])
def attention_combine_kernel(
    o_s, lse_s, cu_seqlens, slots, context_lens, o, T, splits, M, v_scale,
    HQ: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, MIXED: tl.constexpr, GDC: tl.constexpr,
):  # fmt: skip
    i_d, i_h = tl.program_id(0), tl.program_id(1)
    i_n = (tl.program_id(2) + await_inputs(GDC)).to(tl.int64)
    i_t = i_n
    if MIXED:
        i_t = only_token(cu_seqlens, i_n, T)
        if i_t < 0:
            return
    _, tile_lo, tile_hi, per_split = tiles_of(context_of(context_lens, i_n, M, PAGE, WINDOW), splits, WINDOW, BN)
    used = tl.maximum(tl.cdiv(tile_hi - tile_lo, per_split), 1)
    if tl.load(slots + i_n) < 0:
        used = 0
    i_row = i_n * HQ + i_h
    o_d, o_i = i_d * BD + tl.arange(0, BD), tl.arange(0, BS)
    b_acc = tl.zeros([BD], tl.float32)
    b_l = 0.0
    b_m = -1e30
    for i in range(0, used, BS):
        m_i = i + o_i < used
        b_lse = tl.load(lse_s + i_row * splits + i + o_i, mask=m_i, other=float("-inf"))
        p_o = o_s + (i_row * splits + i + o_i)[:, None] * DH + o_d[None, :]
        b_o = tl.load(p_o, mask=m_i[:, None] & (o_d < DH)[None, :], other=0.0)
        b_m_new = tl.maximum(b_m, tl.max(b_lse, 0))
        b_w = tl.exp2(b_lse - b_m_new)
        b_a = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_a + tl.sum(b_w, 0)
        b_acc = b_acc * b_a + tl.sum(b_w[:, None] * b_o, 0)
        b_m = b_m_new
    b_o = b_acc * (fp32(v_scale) / tl.where(used > 0, b_l, 1.0))
    tl.store(o + (i_t * HQ + i_h) * DH + o_d, b_o.to(o.dtype.element_ty), mask=o_d < DH)


def attention_decode_triton(
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
    out: Tensor | None = None,  # [T, Hq * Dh]
) -> Tensor:  # [T, Hq * Dh]
    """Append and attend, one token a sequence. With `out` the call is a mixed one: the rows of sequences of one token
    are written to it, the others stay as they are."""
    mixed = out is not None
    qkv = check_layout(qkv, kv_cache, head_dim)
    fp8, page = kv_cache.dtype == torch.float8_e4m3fn, kv_cache.shape[3]
    group = num_heads // num_kv_heads
    BN, num_warps, num_stages, per_sm = config or decode_config(head_dim, group, qkv.dtype, kv_cache.dtype, page)
    N, M = block_table.shape
    keys = torch.sym_min(M * page, window) if window else M * page
    splits = num_splits(N, num_kv_heads, keys, num_sms(qkv.device), per_sm)
    o_s = qkv.new_empty((N, num_heads, splits, head_dim), dtype=torch.float32)
    lse_s = qkv.new_empty((N, num_heads, splits), dtype=torch.float32)
    o = qkv.new_empty(qkv.shape[0], num_heads * head_dim) if out is None else out
    BD = triton.next_power_of_2(head_dim)
    wrap(attention_decode_kernel)[(splits, num_kv_heads, N)](
        qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, o_s, lse_s,
        qkv.shape[0], splits, M, cos_sin.shape[0], kv_cache.shape[0],
        head_dim**-0.5 * LOG2E * (k_scale if fp8 else 1.0), k_scale, v_scale,
        qkv.stride(0), block_table.stride(0), *kv_cache.stride()[:3],
        HQ=num_heads, HKV=num_kv_heads, DH=head_dim, RD=cos_sin.shape[1], BD=BD, PAGE=page, WINDOW=window,
        BM=max(16, triton.next_power_of_2(num_heads // num_kv_heads)), BN=BN,
        PREC=dot_precision(qkv.dtype), MIXED=mixed, GDC=gdc(), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    wrap(attention_combine_kernel)[(triton.cdiv(head_dim, 32), num_heads, N)](
        o_s, lse_s, cu_seqlens, slots, context_lens, o, qkv.shape[0], splits, M, v_scale if fp8 else 1.0,
        HQ=num_heads, DH=head_dim, BD=32, PAGE=page, WINDOW=window, BN=BN, BS=64, MIXED=mixed, GDC=gdc(), num_warps=4,
    )  # fmt: skip
    return o
