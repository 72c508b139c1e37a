"""Log probabilities of sampled tokens and of the most likely ones, computed on the device behind the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jet_export.runtime.params import Logprob
from jet_export.runtime.transfer import copy_to_host, to_device


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
