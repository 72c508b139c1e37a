"""What a request asks for and what it gets, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jet_export.runtime.sampling import Sampler, Sampling
from jet_export.utils.errors import JetExportError

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARS = 16, 256


@dataclass(frozen=True)
class Params:
    """Raises JetExportError naming the field that is out of range."""

    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    repetition_penalty: float = 1.0  # arXiv 1909.05858, of every token in the prompt and made so far; 1: none
    stop: tuple[str, ...] = ()  # text ends before the first of them
    stop_ids: tuple[int, ...] = ()  # beside the model's end-of-sequence token
    ignore_eos: bool = False
    logprobs: int | None = None  # log probability of each token, and of this many most likely ones

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise JetExportError(f"max_new_tokens is {self.max_new_tokens}.", "Ask for at least 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise JetExportError(f"repetition_penalty {self.repetition_penalty} is not a number > 0.")
        if len(self.stop) > MAX_STOPS or any(not 1 <= len(s) <= MAX_STOP_CHARS for s in self.stop):
            raise JetExportError(f"stop: at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise JetExportError(f"logprobs {self.logprobs} is not between 0 and {MAX_LOGPROBS}.")
        if not -(2**63) <= self.sampling.seed < 2**63:
            raise JetExportError("seed is not a 64-bit integer.")


@dataclass(frozen=True)
class Logprob:
    """Natural logarithms under the model's own distribution, before temperature and filters."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token, log probability), the most likely first


@dataclass(frozen=True)
class Output:
    """A token and the text that it made certain (perhaps none yet). The last Output of a request says why it ended:
    "stop", "length", "cancelled", "timeout" (never left the queue) or "error"."""

    token: int | None
    text: str = ""
    logprob: Logprob | None = None
    finish_reason: str | None = None


class Chooser:
    """Draws one request's tokens: what it draws depends on its own logits and seed alone."""

    def __init__(self, params: Params, prompt: list[int], vocab_size: int, device: torch.device) -> None:
        self.params = params
        self.sampler = Sampler(params.sampling, device)
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True

    @property
    def plain(self) -> bool:
        """The token is the largest logit's."""
        return self.params.sampling.greedy and self.seen is None

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [vocab] -> token [1] int64, on the device."""
        if self.seen is not None:
            logits = penalised(logits.float(), self.seen, self.params.repetition_penalty)
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


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of tokens seen, [vocab]: divided by the penalty where positive, multiplied where negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
