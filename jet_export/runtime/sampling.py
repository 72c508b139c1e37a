"""How tokens are chosen from logits: greedy, temperature, top-k, top-p, min-p. The draw itself: sampler.py."""

from __future__ import annotations

from dataclasses import dataclass

from jet_export.utils.errors import JetExportError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token. Definitions: kernels/sampling.py."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise JetExportError(f"temperature {self.temperature} is not a number >= 0.")
        if not 0 < self.top_p <= 1:
            raise JetExportError(f"top_p {self.top_p} is not in (0, 1].")
        if self.top_k < 0:
            raise JetExportError(f"top_k {self.top_k} is negative.", "0 keeps every token.")
        if not 0 <= self.min_p <= 1:
            raise JetExportError(f"min_p {self.min_p} is not in [0, 1].")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
