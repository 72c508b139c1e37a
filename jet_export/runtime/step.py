"""One step of continuous batching: its inputs, and the step while it runs on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

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
    # Sequences that get a token: of prompt_ends, scored, saved_logits and decode_slots, in this order.
    sampled: list[RunningSequence] = field(default_factory=list)
    sampled_slots: list[int] = field(default_factory=list)  # of `sampled`: a cancellation takes a request's slot away
    sequences: list[RunningSequence] = field(default_factory=list)  # all that take part


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The draw of a step's tokens, launched."""

    tokens: Callable[[], list[int]]  # of inputs.sampled
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
    logits: Tensor  # [len(inputs.sampled), vocab], until the step after it is launched
    scores: list[Score]  # of the prompts that are scored
    draw: Draw | None = None  # once it has been launched

    def tokens(self) -> list[int]:
        """Those of inputs.sampled."""
        assert self.draw is not None
        return self.draw.tokens()

    def logprobs(self) -> dict[int, Logprob]:
        """Row of inputs.sampled -> log probabilities, where they are asked for; those of prompts go to their
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
        return any(s.blocks_overlap for s in self.inputs.sampled)
