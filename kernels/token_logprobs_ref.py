"""The specification of token_logprobs.py in PyTorch, which is what runs on a CPU, where there is no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS_REF = 64  # in fp32 at once


class TokenLogprobs(NamedTuple):
    """Natural logarithms."""

    chosen: Tensor  # [N] fp32
    best: Tensor  # [N] fp32
    best_token: Tensor  # [N] int32
    lse: Tensor  # [N] fp32


def token_logprobs_ref(
    logits: Tensor,  # [N, V]
    tokens: Tensor,  # [N] int64
) -> TokenLogprobs:
    """The specification, ROWS_REF rows at a time."""
    parts = []
    for x, t in zip(logits.split(ROWS_REF), tokens.split(ROWS_REF), strict=True):
        x32 = x.float()
        lse = x32.logsumexp(-1)
        best, token = x32.max(-1)
        parts.append((x32.gather(1, t[:, None])[:, 0] - lse, best - lse, token.int(), lse))
    return TokenLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))
