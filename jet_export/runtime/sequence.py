"""A submitted request with its tokens, its text and the callback that receives its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from jet_export.kernels.sampling_ref import RowSettings
from jet_export.runtime.grammar_compile import CompiledGrammar
from jet_export.runtime.grammar_masks import AnswerMatcher
from jet_export.runtime.params import Logprob, Output, Params
from jet_export.runtime.plan import Request
from jet_export.runtime.snapshot import Snapshot
from jet_export.runtime.tokenizer import StopText

OnOutput = Callable[[Output], None]
Keep = Literal["prompt", "end"]


@dataclass(eq=False, kw_only=True)
class RunningSequence:
    """One request from submission to its last Output.

    `keep` asks for a snapshot of its states, after the prompt or at the end. `snapshot` is set before the last Output
    is delivered, unless the request failed or was cancelled.
    """

    request: Request
    prompt: list[int]  # the tokens of the session it continues included
    params: Params
    text: StopText | None  # None: Outputs carry no text
    on_output: OnOutput
    start: Snapshot | None = None  # continue from here
    keep: Keep | None = None
    choice: int = 0  # which of several answers to one prompt
    keep_logits: bool = False
    tokens: list[int] = field(default_factory=list)
    position: int = 0  # of the next token that the sampler draws; below len(tokens) while a preempted request replays
    scored: int = 0  # prompt tokens whose log probabilities have been launched, with `prompt_logprobs`
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # of prompt[1:], as far as they are known
    logits: list[Tensor] = field(default_factory=list)  # of each token, on the CPU, with `keep_logits`
    snapshot: Snapshot | None = None
    compiled: CompiledGrammar | None = None  # which its answer must match
    matcher: AnswerMatcher | None = None  # where the answer is in it, from its first step until it ends
    first_token_at: float = 0.0  # seconds, on the engine's clock
    finish_reason: str | None = None

    @property
    def blocks_overlap(self) -> bool:
        """Its states or logits are read after the step: the next step must not be launched over them."""
        return self.keep is not None or self.keep_logits

    def row_settings(self, eos: tuple[int, ...]) -> RowSettings:
        """What the sampler is asked for."""
        p, s = self.params, self.params.sampling
        ends = self._ends(eos)
        return RowSettings(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            logit_bias=p.logit_bias,
            min_tokens=p.min_tokens,
            blocked=ends if p.min_tokens else (),
            seed=s.seed,
            choice=self.choice,
        )

    def _ends(self, eos: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.params.stop_ids, *(() if self.params.ignore_eos else eos))

    def match(self, made: list[int], eos: tuple[int, ...]) -> None:
        """The sampler goes on behind these tokens of the answer: its grammar does, too."""
        if self.compiled is not None:
            self.matcher = self.matcher or AnswerMatcher(self.compiled, self._ends(eos))
            self.matcher.rewind(made)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had."""
        return self.request.cached_tokens or 0

    def score_to(self, end: int) -> bool:
        """The first `end` tokens are about to be fed: whether log probabilities are to be launched with them."""
        end = min(end, len(self.prompt) - 1)
        if self.params.prompt_logprobs is None or self.scored >= end:
            return False
        self.scored = end
        return True

    def add_prompt_logprobs(self, first: int, found: list[Logprob]) -> None:
        """Those of the prompt tokens from `first` on; a preempted request may have some of them already."""
        self.prompt_logprobs += found[len(self.prompt_logprobs) + 1 - first :]

    @property
    def delivered_logprobs(self) -> tuple[Logprob, ...]:
        """The log probabilities of the prompt that go out with the token that was appended last."""
        return tuple(self.prompt_logprobs) if self.prompt_logprobs and len(self.tokens) == 1 else ()

    def fed(self, first: int, n: int) -> list[int]:
        """n of the tokens that the model is fed: the prompt, then the answer."""
        if first + n <= len(self.prompt):
            return self.prompt[first : first + n]
        return [*self.prompt, *self.tokens][first : first + n]

    def drawn(self, token: int) -> int | None:
        """A token that was sampled for it; None if it had drawn it before it was preempted, -1 if it drew another."""
        if self.position >= len(self.tokens):
            return token
        self.position += 1
        return None if token == self.tokens[self.position - 1] else -1

    def rest(self) -> str:
        """The text held back, as no more tokens come."""
        return self.text.flush()[0] if self.text else ""

    def goes_on(self, new: list[int], eos: tuple[int, ...]) -> bool:
        """Whether these tokens, behind its first one, are all that there is to hand out, and end nothing."""
        p, made = self.params, len(self.tokens)
        if self.text is not None or self.matcher is not None or p.logprobs is not None or self.keep_logits:
            return False
        if not 0 < made == self.position or made + len(new) >= p.max_new_tokens or min(new) < 0:
            return False
        return set(self._ends(eos)).isdisjoint(new)

    def append(self, token: int, eos: tuple[int, ...]) -> tuple[str, str | None]:
        """Add a sampled token; returns the text that is now final, and the finish reason if the request ends here."""
        self.tokens.append(token)
        self.position = len(self.tokens)
        full = len(self.tokens) == self.params.max_new_tokens
        if token in self.params.stop_ids or (token in eos and not self.params.ignore_eos):
            return self.rest(), "stop"
        if self.text is None:
            return "", "length" if full else None
        text, stopped = self.text.push(token)
        if not stopped and full:
            rest, stopped = self.text.flush()
            return text + rest, "stop" if stopped else "length"
        return text, "stop" if stopped else None
