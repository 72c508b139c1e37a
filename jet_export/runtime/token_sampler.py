"""Samples one request's tokens: repetition penalty, sampling with its own seed, log probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from jet_export.runtime.params import Logprob, Params
from jet_export.runtime.sampling import Sampler


class TokenSampler:
    """The tokens depend on the request's own logits and seed alone, not on the rest of the batch."""

    def __init__(self, params: Params, prompt: list[int], vocab_size: int, device: torch.device) -> None:
        self.params = params
        self.sampler = Sampler(params.sampling, device)
        self.seen: Tensor | None = None  # [vocab] bool, with a repetition penalty
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True

    @property
    def is_argmax(self) -> bool:
        """Greedy without a repetition penalty."""
        return self.params.sampling.greedy and self.seen is None

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [vocab] -> token [1] int64, on the device."""
        if self.seen is not None:
            logits = apply_repetition_penalty(logits.float(), self.seen, self.params.repetition_penalty)
        token = self.sampler(logits[None])
        if self.seen is not None:
            self.seen.index_fill_(0, token, True)
        return token

    def logprob(self, logits: Tensor, token: int) -> Logprob | None:
        if self.params.logprobs is None:
            return None
        p = logits.float().log_softmax(-1)
        values, ids = p.topk(min(self.params.logprobs, len(p)))
        return Logprob(float(p[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [vocab] of the tokens in `seen`: divided by the penalty where positive, multiplied where negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
