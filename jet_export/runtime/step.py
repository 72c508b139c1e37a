"""One step of continuous batching: its inputs, and the step while it runs on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

from jet_export.runtime.acceptance import matched
from jet_export.runtime.params import Logprob
from jet_export.runtime.plan import Plan
from jet_export.runtime.scoring import Score, ScoredChunk
from jet_export.runtime.sequence import RunningSequence


@dataclass(kw_only=True)
class StepInputs:
    """A plan in the form that the runner takes."""

    prefill_slots: list[int] = field(default_factory=list)
    prefill_tokens: list[list[int]] = field(default_factory=list)
    prompt_ends: list[int] = field(default_factory=list)  # rows of the prefill call that end a prompt
    scored: list[ScoredChunk] = field(default_factory=list)  # prompt chunks in calls of their own
    saved_logits: list[Tensor] = field(default_factory=list)  # [vocab] each, of the resumed requests
    decode_slots: list[int] = field(default_factory=list)
    drafts: list[list[int]] | None = None  # of each of decode_slots, [] for none; None: a plain step
    # Sequences that get a token: of prompt_ends, scored, saved_logits and decode_slots, in this order.
    sampled: list[RunningSequence] = field(default_factory=list)
    sampled_slots: list[int] = field(default_factory=list)  # of `sampled`: a cancellation takes a request's slot away
    sequences: list[RunningSequence] = field(default_factory=list)  # all that take part

    @property
    def drafted(self) -> int:
        """Tokens."""
        return sum(map(len, self.drafts or ()))

    @property
    def sampled_drafts(self) -> list[list[int]]:
        """The draft of each of `sampled`."""
        drafts = self.drafts or [[] for _ in self.decode_slots]
        return [*([] for _ in range(len(self.sampled) - len(drafts))), *drafts]

    @property
    def first_rows(self) -> list[int]:
        """Of the step's logits, a row for each position that is sampled, the first of each of `sampled`."""
        if not self.drafted:
            return list(range(len(self.sampled)))
        return list(accumulate((1 + len(draft) for draft in self.sampled_drafts), initial=0))[:-1]

    def accepted(self, tokens: Sequence[int]) -> list[list[int]]:
        """The new tokens of each of `sampled`, of those that were sampled in the step's rows."""
        found = []
        for first, draft in zip(self.first_rows, self.sampled_drafts, strict=True):
            n = matched(draft, tokens[first : first + len(draft)])
            found.append(list(tokens[first : first + n + 1]))
        return found


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The draw of a step's tokens, launched."""

    tokens: Callable[[], list[int]]  # of the step's rows: one a sequence of inputs.sampled, and one a drafted token
    logprobs: Callable[[], dict[int, Logprob]]  # row -> log probabilities, of the sequences that asked
    prompt_logits: dict[int, Tensor]  # row -> a copy of its logits, of sequences whose prompt is kept
    kept_logits: Tensor | None  # a copy on the CPU, if a sequence keeps its logits


@dataclass(kw_only=True)
class InFlightStep:
    """A step whose forward pass has been launched, and with or after it the draw of its tokens. What is read of it
    waits for it, and not for what is launched after it."""

    plan: Plan
    inputs: StepInputs
    launched_at: float = 0.0  # on the engine's clock
    after_rest: bool = False  # nothing ran before it
    timed: bool = True  # it took the time of a step of its size
    looked: float = 0.0  # seconds in which the host looked for drafts, of this step or the next
    logits: Tensor  # [rows, vocab], until the step after it is launched
    scores: list[Score]  # of the prompts that are scored
    draw: Draw | None = None  # once it has been launched

    def tokens(self) -> list[int]:
        """Those of the step's rows."""
        assert self.draw is not None
        return self.draw.tokens()

    def logprobs(self) -> dict[int, Logprob]:
        """Row -> log probabilities, where they are asked for; those of prompts go to their
        sequences."""
        assert self.draw is not None
        for score in self.scores:
            score.deliver()
        return self.draw.logprobs()

    @property
    def masked(self) -> bool:
        """Which tokens may be drawn depends on those of the step before."""
        return any(s.compiled is not None for s in self.inputs.sampled)

    @property
    def blocks_overlap(self) -> bool:
        return self.inputs.drafted > 0 or any(s.blocks_overlap for s in self.inputs.sampled)
