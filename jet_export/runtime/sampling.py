"""Sampling the next token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.utils.errors import JetExportError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise JetExportError(f"temperature {self.temperature} is not a number >= 0.")
        if not 0 < self.top_p <= 1:
            raise JetExportError(f"top_p {self.top_p} is not in (0, 1].")
        if self.top_k < 0:
            raise JetExportError(f"top_k {self.top_k} is negative.", "0 keeps every token.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """Samples tokens; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [N, vocab] -> tokens [N] int64."""
        s = self.sampling
        if s.greedy:
            return logits.argmax(-1)
        probs = filtered_probs(logits.float() / s.temperature, s.top_k, s.top_p)
        return torch.multinomial(probs, 1, generator=self.generator).squeeze(-1)


def filtered_probs(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Softmax over the top_k most likely tokens, then over the fewest of those whose probability reaches top_p."""
    if top_k and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        # Keep a token while the mass before it is below top_p: the most likely one always stays.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs
