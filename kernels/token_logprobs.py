"""Log probabilities of given tokens, and the most likely tokens, of rows of logits x [N, V]:

    lse_i = ln(sum_v exp x_iv)     chosen_i = x_i[t_i] - lse_i     best_i = max_v x_iv - lse_i, at the lowest such v

The logits stay in their dtype and are read once; sums are fp32. chosen_i == best_i exactly where t_i is a most likely
token. Online softmax (arXiv 1805.02867) in every lane, which are joined at a row's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jet_export.kernels.token_logprobs_ref import TokenLogprobs


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
