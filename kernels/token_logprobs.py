"""Log probabilities of given tokens, and the most likely tokens, of rows of logits x [N, V]:

    lse_i = ln(sum_v exp x_iv)     chosen_i = x_i[t_i] - lse_i     best_i = max_v x_iv - lse_i, at the lowest such v

The logits stay in their dtype and are read once; sums are fp32. chosen_i == best_i exactly where t_i is a most likely
token. Online softmax (arXiv 1805.02867) in every lane, which are joined at a row's end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_REF = 64  # of the reference, in fp32 at once


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


@triton.jit
def token_logprobs_kernel(
    logits, tokens, chosen, best, best_token, lse,
    stride_logits, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (N)."""
    i_n = tl.program_id(0)
    p_row = logits + i_n.to(tl.int64) * stride_logits
    o_lane = tl.arange(0, BV)
    b_max = tl.full([BV], -3.4028234663852886e38, tl.float32)  # finite: exp(-inf - b_max) is 0
    b_sum = tl.zeros([BV], tl.float32)
    b_at = tl.zeros([BV], tl.int32)
    for i in tl.range(0, tl.cdiv(V, BV), num_stages=3):
        o_v = i * BV + o_lane
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
        b_new = tl.maximum(b_max, b_x)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_x - b_new)
        b_at = tl.where(b_x > b_max, o_v, b_at)
        b_max = b_new
    top = tl.max(b_max, 0)
    total = top + tl.log(tl.sum(b_sum * tl.exp(b_max - top), 0))
    at = tl.min(tl.where(b_max == top, b_at, V), 0)
    x = tl.load(p_row + tl.load(tokens + i_n)).to(tl.float32)
    tl.store(chosen + i_n, x - total)
    tl.store(best + i_n, top - total)
    tl.store(best_token + i_n, at)
    tl.store(lse + i_n, total)


def token_logprobs_triton(
    logits: Tensor,  # [N, V], rows contiguous
    tokens: Tensor,  # [N] int64
) -> TokenLogprobs:
    """Launches the kernel. Nothing synchronises."""
    N, V = logits.shape
    chosen, best, lse = (logits.new_empty(N, dtype=torch.float32) for _ in range(3))
    best_token = logits.new_empty(N, dtype=torch.int32)
    token_logprobs_kernel[(N,)](
        logits, tokens, chosen, best, best_token, lse,
        logits.stride(0), V=V, BV=min(2048, triton.next_power_of_2(V)), num_warps=8,
    )  # fmt: skip
    return TokenLogprobs(chosen, best, best_token, lse)


def token_logprobs(logits: Tensor, tokens: Tensor) -> TokenLogprobs:
    """By the kernel on a GPU."""
    return token_logprobs_triton(logits, tokens) if logits.is_cuda else token_logprobs_ref(logits, tokens)
