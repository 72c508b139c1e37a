"""Keeps hidden states by page, in the pages that hold the keys and values of the same tokens.

    kept[page, 0, 0, p % PAGE] = h[t],   p = context_lens[n] + (t - cu_seqlens[n])
    page = block_table[n, (p // PAGE) % M]

for token t of sequence n. A row with `slots[n] < 0` is padding: nothing is written for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.attention_verify import sequence_of
from jet_export.kernels.common import clamp, sequence_bounds, wrap
from jet_export.kernels.rope_append import LAST_POSITION
from jet_export.kernels.triton_op import triton_op


def keep_hidden_ref(
    h: Tensor,  # [T, D]
    kept: Tensor,  # [pages, 1, 1, PAGE, D], of h's dtype; updated in place
    block_table: Tensor,  # [N, M] int32
    cu_seqlens: Tensor,  # [N + 1] int32
    slots: Tensor,  # [N] int32
    context_lens: Tensor,  # [N] int32
) -> None:
    """The specification and the CPU implementation."""
    T, page = len(h), kept.shape[3]
    rows = torch.repeat_interleave(torch.arange(len(slots)), cu_seqlens.diff().long(), output_size=T)
    live = (slots >= 0)[rows].nonzero()[:, 0]
    n = rows[live]
    p = context_lens.long()[n] + live - cu_seqlens.long()[n]
    kept[block_table.long()[n, (p // page) % block_table.shape[1]], 0, 0, p % page] = h[live]


@triton.jit(do_not_specialize=["N", "T", "M", "pages", "stride_t", "stride_table"])
def keep_hidden_kernel(
    h, kept, block_table, cu_seqlens, slots, context_lens, N, T, M, pages, stride_t, stride_table,
    D: tl.constexpr, PAGE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (T, blocks of columns)."""
    i_t, i_d = tl.program_id(0), tl.program_id(1)
    i_n = sequence_of(cu_seqlens, i_t, N)
    start, end = sequence_bounds(cu_seqlens, i_n, T)
    live = (i_t >= start) & (i_t < end) & (tl.load(slots + i_n) >= 0)
    p = clamp(tl.load(context_lens + i_n), 0, LAST_POSITION) + i_t - start
    i_page = tl.load(block_table + i_n.to(tl.int64) * stride_table + (p // PAGE) % M, mask=live, other=0)
    i_row = clamp(i_page, 0, pages - 1).to(tl.int64) * PAGE + p % PAGE
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = (o_d < D) & live
    b_h = tl.load(h + i_t.to(tl.int64) * stride_t + o_d, mask=m_d, other=0.0)
    tl.store(kept + i_row * D + o_d, b_h, mask=m_d)


def keep_hidden_triton(
    h: Tensor, kept: Tensor, block_table: Tensor, cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor
) -> None:
    """Arguments as `keep_hidden_ref`. Raises ValueError for a pool that the kernel cannot address."""
    (T, D), (N, M), page = h.shape, block_table.shape, kept.shape[3]
    if kept.shape[4] != D or not kept.is_contiguous():
        raise ValueError(f"kept has rows of {kept.shape[4]}, hidden states {D}; it must be contiguous")
    h = h if h.stride(1) == 1 else h.contiguous()
    BD = min(triton.next_power_of_2(D), 2048)
    wrap(keep_hidden_kernel)[(T, triton.cdiv(D, BD))](
        h, kept, block_table, cu_seqlens, slots, context_lens,
        N, T, M, kept.shape[0], h.stride(0), block_table.stride(0), D=D, PAGE=page, BD=BD,
    )  # fmt: skip


@torch.library.custom_op("jet::keep_hidden_cpu", mutates_args=("kept",))
def keep_hidden_cpu(
    h: Tensor, kept: Tensor, block_table: Tensor, cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor
) -> None:
    """keep_hidden_ref behind an opaque op, so that no compiler traces into it."""
    keep_hidden_ref(h, kept, block_table, cu_seqlens, slots, context_lens)


@keep_hidden_cpu.register_fake
def _(h, kept, block_table, cu_seqlens, slots, context_lens):
    return None


@triton_op("jet::keep_hidden", mutates_args={"kept"})
def keep_hidden(
    h: Tensor, kept: Tensor, block_table: Tensor, cu_seqlens: Tensor, slots: Tensor, context_lens: Tensor
) -> None:
    """Arguments as `keep_hidden_ref`."""
    if h.device.type == "cpu":
        torch.ops.jet.keep_hidden_cpu(h, kept, block_table, cu_seqlens, slots, context_lens)
    else:
        keep_hidden_triton(h, kept, block_table, cu_seqlens, slots, context_lens)
