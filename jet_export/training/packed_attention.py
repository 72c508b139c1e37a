"""Causal and sliding-window attention over packed rows, differentiable: no token sees another sequence than its own.

On a GPU flex_attention, which skips the blocks that the mask leaves empty; on a CPU scaled_dot_product_attention with
the mask written out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jet_export.training.data.rows import Batch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [R, Hq, L, Dh], k, v [R, Hkv, L, Dh] -> [R, Hq, L, Dh]


def attend_for(batch: Batch, window: int) -> Attend:
    """Attention of this batch: token i sees key j of its own sequence with j <= i, and i - window < j if window > 0."""
    segments = batch.segments.view(batch.rows, -1)
    return _flex(segments, window) if segments.is_cuda else _masked(segments, window)


def _masked(segments: Tensor, window: int) -> Attend:
    i = torch.arange(segments.shape[1], device=segments.device)
    seen = (i[None] <= i[:, None]) & ((i[None] > i[:, None] - window) if window else torch.tensor(True))
    mask = ((segments[:, None] == segments[:, :, None]) & seen)[:, None]  # [R, 1, L, L]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return attend


def _flex(segments: Tensor, window: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = (segments[b, i] == segments[b, j]) & (j <= i)
        return same & (j > i - window) if window else same

    rows, length = segments.shape
    mask = create_block_mask(seen, rows, None, length, length, device=segments.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)
        return out

    return attend


@lru_cache(1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """RoPE. x [T, heads, Dh], cos_sin [T, Dh] (cos | sin, Dh / 2 each, in x's dtype) -> [T, heads, Dh]."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
