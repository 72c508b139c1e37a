"""The parameters of a request, and the Outputs it receives token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from jet_export.kernels.sampling_ref import MAX_BLOCKED
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.sampling import Sampling
from jet_export.utils.errors import JetExportError

MAX_LOGPROBS = 20
MAX_CHOICES = 128  # OpenAI's
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
    prompt_logprobs: int | None = None  # the same of each prompt token but the first; the prefix cache is not used
    presence_penalty: float = 0.0  # taken from the logits of tokens in the output
    frequency_penalty: float = 0.0  # the same, times how often they are in it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    n: int = 1  # answers to each prompt, drawn with different random numbers; see ServingEngine.submit
    priority: int = 0  # the lower is started first, and preempted last
    min_tokens: int = 0  # before so many are generated, neither the end-of-sequence token nor stop_ids are
    grammar: Grammar | None = None  # which the answer matches; it ends where the grammar does

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise JetExportError(f"max_new_tokens is {self.max_new_tokens}.", "Ask for at least 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise JetExportError(f"repetition_penalty {self.repetition_penalty} is not a number > 0.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise JetExportError(f"{name} {getattr(self, name)} is not a number.")
        if any(math.isnan(bias) for _, bias in self.logit_bias):
            raise JetExportError("logit_bias: not a number.")
        if not 1 <= self.n <= MAX_CHOICES:
            raise JetExportError(f"n {self.n} is not between 1 and {MAX_CHOICES}.")
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise JetExportError(f"min_tokens {self.min_tokens} is not between 0 and max_tokens {self.max_new_tokens}.")
        if self.min_tokens and len(self.stop_ids) >= MAX_BLOCKED:
            raise JetExportError(f"min_tokens with {len(self.stop_ids)} stop_ids: at most {MAX_BLOCKED - 1}.")
        if len(self.stop) > MAX_STOPS or any(not 1 <= len(s) <= MAX_STOP_CHARS for s in self.stop):
            raise JetExportError(f"stop: at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters.")
        for asked in (self.logprobs, self.prompt_logprobs):
            if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
                raise JetExportError(f"logprobs {asked} is not between 0 and {MAX_LOGPROBS}.")
        if not -(2**31) <= self.priority < 2**31:
            raise JetExportError(f"priority {self.priority} is not a 32-bit integer.")
        if not -(2**63) <= self.sampling.seed < 2**63:
            raise JetExportError("seed is not a 64-bit integer.")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that it names, which must be in the vocabulary."""
        return (*self.stop_ids, *(token for token, _ in self.logit_bias))

    def check(self, eos: Sequence[int], held: int) -> None:
        """Raises JetExportError if `min_tokens` would have to keep too many tokens away, or `prompt_logprobs` are asked
        for in a session that holds tokens already."""
        if self.prompt_logprobs is not None and held:
            raise JetExportError("prompt_logprobs need the whole prompt.", "Do not continue a session.")
        ends = len(self.stop_ids) + len(eos)
        if self.min_tokens and ends > MAX_BLOCKED:
            raise JetExportError(f"min_tokens with {ends} stop_ids and end-of-sequence tokens: at most {MAX_BLOCKED}.")


def end_tokens(eos: int | Sequence[int]) -> tuple[int, ...]:
    """End-of-sequence tokens; a negative one is none."""
    return tuple(i for i in ([eos] if isinstance(eos, int) else eos) if i >= 0)


def check_tokens(ids: Iterable[int], vocab: int) -> None:
    """Raises JetExportError for a token id outside the vocabulary."""
    bad = next((t for t in ids if not 0 <= t < vocab), None)
    if bad is not None:
        raise JetExportError(f"token {bad} is not in the vocabulary of {vocab}.")


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
    prompt_logprobs: tuple[Logprob, ...] = ()  # of the first Output, if asked for: those of prompt token 1 and on
