"""Log probabilities of tokens and of the most likely ones, computed on the device behind the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jet_export.kernels.token_logprobs_ref import TokenLogprobs, token_logprobs_ref
from jet_export.runtime.params import Logprob
from jet_export.runtime.transfer import copy_to_host, to_device

ROWS = 64  # of logits, in fp32 at once


def launch_logprobs(
    logits: Tensor,  # [N, vocab]
    tokens: Tensor,  # [N] int64, -1: none
    lse: Tensor,  # [N] fp32: ln of the sum of exp of the logits
    top: dict[int, int],  # row -> how many most likely tokens it asks for
) -> Callable[[], dict[int, Logprob]]:
    """Launch them; the returned function waits for them. Only rows in `top` are computed."""
    if not top:
        return dict
    rows = to_device(torch.tensor(list(top), dtype=torch.int64), logits.device)
    picked = logits[rows].float()
    total = lse[rows, None]
    chosen = picked.gather(1, tokens[rows, None].clamp_min(0)) - total
    most = min(max(top.values()), logits.shape[1])
    values, ids = picked.topk(most, dim=-1)
    numbers = copy_to_host(torch.cat([chosen, values - total], dim=1))
    names = copy_to_host(ids)

    def wait() -> dict[int, Logprob]:
        found = zip(top.items(), numbers().tolist(), names().tolist(), strict=True)
        return {
            row: Logprob(values[0], tuple(zip(ids[:n], values[1 : n + 1], strict=True)))
            for (row, n), values, ids in found
        }

    return wait


def token_logprobs(logits: Tensor, tokens: Tensor) -> TokenLogprobs:
    """By the kernel on a GPU."""
    if not logits.is_cuda:
        return token_logprobs_ref(logits, tokens)
    from jet_export.kernels.token_logprobs import token_logprobs_triton  # imports Triton, which a CPU does without

    return token_logprobs_triton(logits, tokens)


def launch_prompt_logprobs(
    logits: Tensor,  # [N, vocab]
    tokens: Tensor,  # [N] int64
    top: Sequence[int],  # how many most likely tokens each row asks for
) -> Callable[[], list[Logprob]]:
    """The same of every row, the logits being read once in their dtype; only rows that ask for more than one most
    likely token are made fp32, ROWS at a time."""
    found = token_logprobs(logits, tokens)
    numbers = copy_to_host(torch.stack([found.chosen, found.best]))
    best_token = copy_to_host(found.best_token)
    more = [i for i, n in enumerate(top) if n > 1]
    wide = [
        launch_logprobs(logits, tokens, found.lse, {i: top[i] for i in more[k : k + ROWS]})
        for k in range(0, len(more), ROWS)
    ]

    def wait() -> list[Logprob]:
        chosen, best = numbers().tolist()
        rows = [
            Logprob(c, ((t, b),) if n else ())
            for c, t, b, n in zip(chosen, best_token().tolist(), best, top, strict=True)
        ]
        for part in wide:
            for i, logprob in part().items():
                rows[i] = logprob
        return rows

    return wait
