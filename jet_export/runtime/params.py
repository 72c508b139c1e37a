"""The parameters of a request, and the Outputs it receives token by token."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field

from jet_export.runtime.sampling import Sampling
from jet_export.utils.errors import JetExportError

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARS = 16, 256


@dataclass(frozen=True)
class Params:
    """How a request is sampled and when it stops. Raises JetExportError naming the field that is out of range."""

    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    _: KW_ONLY
    repetition_penalty: float = 1.0  # arXiv 1909.05858, over the prompt and the tokens generated so far; 1: none
    stop: tuple[str, ...] = ()  # the text ends before the first stop string
    stop_ids: tuple[int, ...] = ()  # in addition to the model's end-of-sequence token
    ignore_eos: bool = False
    logprobs: int | None = None  # log probability of each token, and of this many most likely tokens

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
    """Natural logarithms under the model's own distribution, before temperature, top-k and top-p."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token, log probability), most likely first


@dataclass(frozen=True)
class Output:
    """A token and the text that became final with it (possibly none). The last Output of a request has the reason:
    "stop", "length", "cancelled", "timeout" (it never left the queue) or "error"."""

    token: int | None
    text: str = ""
    logprob: Logprob | None = None
    finish_reason: str | None = None
