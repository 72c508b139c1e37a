"""Attention over a paged key/value cache: rotary embedding, append, attend; one op for prefill and decode.

For token t of sequence n, at position p = context_lens[n] + (t - cu_seqlens[n]):

    q, k = rope(q, p), rope(k, p)            rope(x) = [x1, x2] * [cos, cos] + [-x2, x1] * [sin, sin] | rest
    cache[n, p] = k / k_scale, v / v_scale   (k_scale = v_scale = 1 unless the cache is FP8)
    o[t] = sum_j softmax_j(q . k[n, j] * Dh^-0.5) v[n, j]      over j <= p, and j > p - window when window > 0

x = x1 | x2 | rest: of a head's columns the first are rotated, as many as the rotary table has. The rotary products and
sums are rounded in the model dtype, as published; the softmax is fp32. Query head h reads key/value head h // (Hq /
Hkv). Keys of the current call are read back from the cache, so an FP8 cache rounds them too, and a prompt in several
calls equals one in a single call.

Position p of sequence n lives in page `block_table[n, (p // page) % M]` at offset `p % page`: a row that covers all
positions is a plain page table, a shorter one is a ring, enough for a window when M * page >= window + tokens a call.
A row with `slots[n] < 0` is padding: nothing is read or written for it and its outputs are zero.

Source: modeling_jet_nemotron.py (Qwen2 attention), arXiv 2508.15884; paging as in vLLM, arXiv 2309.06180.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.kernels.attention_decode import attention_decode_triton
from jet_export.kernels.attention_prefill import attention_prefill_triton
from jet_export.kernels.attention_verify import attention_verify_triton
from jet_export.kernels.form import Form
from jet_export.kernels.triton_op import triton_op

FP8_MAX = 448.0  # largest finite float8_e4m3fn
QUERY_BLOCK = 512  # the reference attends this many tokens of a sequence at a time


def rope_ref(
    x: Tensor,  # [T, H, Dh]
    cos_sin: Tensor,  # [T, R]: cos [R / 2] | sin [R / 2]
) -> Tensor:
    """Rotate-half rotary embedding of the first R columns, every product and sum rounded to x.dtype."""
    cos, sin = cos_sin.to(x.dtype)[:, None].chunk(2, -1)
    x, rest = x.tensor_split([cos_sin.shape[-1]], -1)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), -1)


def quantize_ref(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """x as the cache stores it: unchanged, or x / scale clamped and rounded to FP8."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(dtype)


def _raw(kv_cache: Tensor) -> Tensor:
    """A view that can be indexed: for FP8 its bytes, since torch does not index FP8 tensors."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype == torch.float8_e4m3fn else kv_cache


def gather_ref(
    kv_cache: Tensor,  # [pages, 2, Hkv, page, Dh]
    block_table: Tensor,  # [B, M]
    positions: Tensor,  # [B, L]
    k_scale: float,
    v_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # 2 x [B, Hkv, L, Dh]
    """The cached keys and values at these positions, dequantised."""
    page = kv_cache.shape[3]
    pages = block_table.long().gather(1, (positions // page) % block_table.shape[1])
    kv = _raw(kv_cache)[pages, :, :, positions % page].view(kv_cache.dtype).to(dtype)  # [B, L, 2, Hkv, Dh]
    k, v = kv.permute(2, 0, 3, 1, 4)
    return (k * k_scale, v * v_scale) if kv_cache.dtype == torch.float8_e4m3fn else (k, v)


def attend_ref(
    q: Tensor,  # [B, Tq, Hq, Dh]
    positions: Tensor,  # [B, Tq], consecutive along Tq
    kv_cache: Tensor,  # [pages, 2, Hkv, page, Dh]
    block_table: Tensor,  # [B, M]
    window: int,
    k_scale: float,
    v_scale: float,
) -> Tensor:  # [B, Tq, Hq, Dh]
    """Attention of B equally long runs of consecutive tokens whose keys are all in the cache, in fp32 or better."""
    B, Tq, Hq, Dh = q.shape
    Hkv = kv_cache.shape[2]
    G = Hq // Hkv
    last = positions[:, -1:]
    first = (positions[:, :1] - window + 1).clamp(min=0) if window else torch.zeros_like(last)
    keys = first + torch.arange(int((last - first).max()) + 1)  # [B, L]; beyond `last` they repeat it, masked
    visible = keys[:, None] <= positions[:, :, None]  # [B, Tq, L]
    if window:
        visible &= keys[:, None] > positions[:, :, None] - window
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = gather_ref(kv_cache, block_table, keys.minimum(last), k_scale, v_scale, dtype)
    q = q.to(dtype).view(B, Tq, Hkv, G, Dh).permute(0, 2, 3, 1, 4).reshape(B, Hkv, G * Tq, Dh)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.repeat(1, G, 1)[:, None], scale=Dh**-0.5)
    return o.view(B, Hkv, G, Tq, Dh).permute(0, 3, 1, 2, 4).reshape(B, Tq, Hq, Dh)


def attention_ref(
    qkv: Tensor,  # [T, (Hq + 2 Hkv) * Dh], biases added, before RoPE
    cos_sin: Tensor,  # [P, R]: cos | sin of each position, R <= Dh
    kv_cache: Tensor,  # [pages, 2, Hkv, page, Dh], model dtype or float8_e4m3fn; updated in place
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
    block: int = QUERY_BLOCK,
) -> Tensor:  # [T, Hq * Dh]
    """The specification and the CPU implementation. Positions beyond the rotary table use its last row.

    `block`: tokens of a sequence that are computed together; with 1 a token's bits do not depend on the others."""
    T, N, page = qkv.shape[0], slots.shape[0], kv_cache.shape[3]
    starts, lens = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    seq = torch.repeat_interleave(torch.arange(N), lens, output_size=T)  # [T]
    positions = context_lens.long()[seq] + torch.arange(T) - starts[seq]  # [T]

    q, k, v = qkv.view(T, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), 1)
    rows = cos_sin[positions.clamp(max=cos_sin.shape[0] - 1)]
    q, k = rope_ref(q, rows), rope_ref(k, rows)

    live = (slots >= 0)[seq].nonzero()[:, 0]  # tokens of rows that are not padding
    kv = torch.stack((quantize_ref(k, k_scale, kv_cache.dtype), quantize_ref(v, v_scale, kv_cache.dtype)), 1)
    p, n = positions[live], seq[live]
    pages = block_table[n, (p // page) % block_table.shape[1]].long()
    _raw(kv_cache)[pages, :, :, p % page] = _raw(kv)[live]

    o = torch.zeros(T, num_heads, head_dim, dtype=qkv.dtype)
    for i, (start, length, slot) in enumerate(zip(starts.tolist(), lens.tolist(), slots.tolist(), strict=True)):
        for t in range(start, start + length if slot >= 0 else start, block):
            s = slice(t, min(t + block, start + length))
            args = q[None, s], positions[None, s], kv_cache, block_table[i : i + 1], window, k_scale, v_scale
            o[s] = attend_ref(*args)[0].to(o.dtype)
    return o.view(T, -1)


def attention_triton(
    qkv: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    k_scale: float,
    v_scale: float,
    form: int,
) -> Tensor:
    """Launches the kernels of the form, those of MIXED being prefill's and decode's.

    Arguments as `attention_ref`, and `form.Form`."""
    inputs = qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens
    sizes = num_heads, num_kv_heads, head_dim, window, k_scale, v_scale
    form = Form(int(form))  # may be symbolic in a dynamic torch.compile
    if form is Form.DECODE:
        return attention_decode_triton(*inputs, *sizes)
    if form is Form.VERIFY:
        return attention_verify_triton(*inputs, *sizes)
    o = attention_prefill_triton(*inputs, *sizes, mixed=form is Form.MIXED)
    return attention_decode_triton(*inputs, *sizes, out=o) if form is Form.MIXED else o


@torch.library.custom_op("jet::attention_cpu", mutates_args=("kv_cache",))
def attention_cpu(
    qkv: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    k_scale: float,
    v_scale: float,
    form: int,
) -> Tensor:
    """attention_ref behind an opaque op, so that no compiler traces into it."""
    return attention_ref(
        qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens,
        num_heads, num_kv_heads, head_dim, window, k_scale, v_scale, 1 if form == Form.VERIFY else QUERY_BLOCK,
    )  # fmt: skip


@attention_cpu.register_fake
def _(
    qkv,
    cos_sin,
    kv_cache,
    block_table,
    cu_seqlens,
    slots,
    context_lens,
    num_heads,
    num_kv_heads,
    head_dim,
    window,
    k_scale,
    v_scale,
    form,
):
    return qkv.new_empty(qkv.shape[0], num_heads * head_dim)


@triton_op("jet::attention", mutates_args={"kv_cache"})
def attention(
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
    form: int,
) -> Tensor:  # [T, Hq * Dh]
    """See the module. The form of the call (`form.Form`) chooses the kernels when the op is traced."""
    sizes = num_heads, num_kv_heads, head_dim, window, k_scale, v_scale
    if qkv.device.type == "cpu":
        return torch.ops.jet.attention_cpu(
            qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, *sizes, form
        )
    return attention_triton(qkv, cos_sin, kv_cache, block_table, cu_seqlens, slots, context_lens, *sizes, form)
