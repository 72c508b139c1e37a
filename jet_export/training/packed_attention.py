"""Causal and sliding-window attention over packed rows, differentiable: no token sees another sequence than its own.

On a GPU flex_attention, which skips the blocks that the mask leaves empty; on a CPU scaled_dot_product_attention with
the mask written out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.training.data.rows import Batch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens, of flex_attention's
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [R, Hq, L, Dh], k, v [R, Hkv, L, Dh] -> [R, Hq, L, Dh]


def attend_for(batch: Batch, window: int) -> Attend:
    """Attention of this batch: token i sees key j of its own sequence with j <= i, and i - window < j if window > 0."""
    if window not in batch.masks:
        segments = batch.segments.view(batch.rows, -1)
        batch.masks[window] = _flex(segments, window) if segments.is_cuda else _masked(segments, window)
    attend: Attend = batch.masks[window]
    return attend


def _masked(segments: Tensor, window: int) -> Attend:
    i = torch.arange(segments.shape[1], device=segments.device)
    seen = (i[None] <= i[:, None]) & ((i[None] > i[:, None] - window) if window else torch.tensor(True))
    mask = ((segments[:, None] == segments[:, :, None]) & seen)[:, None]  # [R, 1, L, L]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return attend


def _flex(segments: Tensor, window: int) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = (segments[b, i] == segments[b, j]) & (j <= i)
        return same & (j > i - window) if window else same

    mask = block_mask(segments, window, seen)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()  # in a layer that is compiled
        out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=True)
        return out

    return attend


def block_mask(segments: Tensor, window: int, seen: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> BlockMask:
    """create_block_mask's of `seen`, from the first and the last sequence of each block: segments [R, L] never fall."""
    from torch.nn.attention.flex_attention import BlockMask

    length = segments.shape[1]
    starts = torch.arange(0, length, BLOCK, device=segments.device)
    first, last = segments[:, starts], segments[:, (starts + BLOCK - 1).clamp(max=length - 1)]
    behind = starts[:, None] - starts  # of a block of queries [B, 1] and one of keys [1, B]
    some = (behind > 0) & (last[:, None] == first[:, :, None])  # [R, B, B]
    every = (behind > 0) & (first[:, None] == last[:, :, None]) & (starts + BLOCK <= length)[:, None]
    if window:
        some, every = some & (behind - BLOCK + 1 < window), every & (behind + BLOCK - 1 < window)
    some = some | (behind == 0)
    partly, every = (some & ~every)[:, None], every[:, None]
    kv, full_kv, q, full_q = (_ordered(m) for m in (partly, every, partly.mT, every.mT))
    return BlockMask((length, length), *kv, *full_kv, *q, *full_q, (BLOCK, BLOCK), seen)


def _ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and the columns, those that are set first: int32."""
    columns = torch.argsort(mask.int(), dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), columns.int().contiguous()


@lru_cache(1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """RoPE. x [T, heads, Dh], cos_sin [T, Dh] (cos | sin, Dh / 2 each, in x's dtype) -> [T, heads, Dh]."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
