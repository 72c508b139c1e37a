"""Hands the tokens of a step to their requests, and ends the requests that have their whole answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from jet_export.runtime.executor import Executor
from jet_export.runtime.metrics import Metrics
from jet_export.runtime.params import Logprob, Output
from jet_export.runtime.plan import Request
from jet_export.runtime.scheduler import Scheduler
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.step import InFlightStep
from jet_export.utils.errors import JetExportError

log = logging.getLogger(__name__)


class Delivery:
    """The requests that have not ended. Everything is called under the engine's lock."""

    def __init__(self, executor: Executor, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.executor, self.scheduler, self.metrics, self.clock = executor, scheduler, metrics, clock
        self.sequences: dict[Request, RunningSequence] = {}
        self.on_end: Callable[[RunningSequence], None] = lambda sequence: None

    def hand_out(self, step: InFlightStep, new: list[list[int]], logprobs: dict[int, Logprob], now: float) -> int:
        """Deliver what a step has sampled, the `new` tokens of each of its sequences; returns how many went out."""
        inputs, draw, delivered = step.inputs, step.draw, 0
        assert draw is not None
        moved: dict[int, list[int]] = {}  # slot -> its new tokens, in a step with drafts
        rows = zip(inputs.first_rows, inputs.sampled_slots, inputs.sampled, inputs.sampled_drafts, strict=True)
        for (first, slot, sequence, draft), tokens in zip(rows, new, strict=True):
            made, left = 0, tokens
            if draft and sequence.finish_reason is None and sequence.goes_on(tokens, self.executor.eos):
                made, left = self._extend(sequence, slot, tokens), []
                delivered += made
            for row, sampled in enumerate(left, first):
                if sequence.finish_reason is not None:  # it ended after the launch, or with the token before
                    break
                made += 1
                if made > 1:
                    self._take(sequence, slot, 1)
                token = sequence.drawn(sampled)
                if token is None:
                    continue
                if draw.kept_logits is not None and sequence.keep_logits:
                    sequence.logits.append(draw.kept_logits[row])
                self.add_token(sequence, token, logprobs.get(row), draw.prompt_logits.get(row), now)
                delivered += 1
            if inputs.drafted and made and sequence.finish_reason is None:
                moved[slot] = tokens
            if draft and made and self.metrics.drafts:
                self.metrics.drafts.add(len(draft), min(made, len(tokens) - 1))
        self.executor.advance(moved)
        return delivered

    def _extend(self, sequence: RunningSequence, slot: int, tokens: list[int]) -> int:
        """Hand out tokens that end nothing. Returns how many went out."""
        self._take(sequence, slot, len(tokens) - 1)
        for n, token in enumerate(tokens):
            if sequence.finish_reason is not None:  # its callback has failed, or cancelled it
                return n
            sequence.tokens.append(token)
            sequence.position += 1
            self._deliver(sequence, Output(token))
        return len(tokens)

    def _take(self, sequence: RunningSequence, slot: int, n: int) -> None:
        """The states hold n drafted tokens that were right."""
        self.executor.take(slot, n)
        self.scheduler.take(sequence.request, n)

    def fail(self, sequences: Sequence[RunningSequence], e: Exception) -> None:
        """A step failed, and so do its requests."""
        log.error("step failed; its requests end with an error", exc_info=e)
        self.executor.failure = e
        for sequence in sequences:
            self.end(sequence, Output(None, finish_reason="error"))

    def add_token(
        self, sequence: RunningSequence, token: int, logprob: Logprob | None, prompt_logits: Tensor | None, now: float
    ) -> None:
        """Deliver a sampled token, and end the request if it is the last."""
        matcher = sequence.matcher
        if matcher is not None and matcher.error:
            self.executor.failure = JetExportError(f"The grammar of the request failed: {matcher.error}.")
            token = -1
        if token < 0:
            self.end(sequence, Output(None, finish_reason="error"))
            return
        if sequence.keep == "prompt":
            sequence.snapshot = self.executor.snapshot(sequence, prompt_logits)
            self.end(sequence, Output(None, finish_reason="length"))
            return
        if matcher is not None and matcher.closed == len(sequence.tokens):  # found when this token was to be drawn
            self._end_kept(sequence, Output(None, sequence.rest(), finish_reason="stop"))
            return
        text, reason = sequence.append(token, self.executor.eos)
        if len(sequence.tokens) == 1:
            sequence.first_token_at = now
            self.metrics.ttft.observe(now - sequence.request.arrival)
        output = Output(token, text, logprob, reason, sequence.delivered_logprobs)
        if matcher is not None and matcher.closed == len(sequence.tokens) and reason != "stop":
            self._deliver(sequence, replace(output, finish_reason=None))
            self._end_kept(sequence, Output(None, sequence.rest(), finish_reason="stop"))
        elif reason:
            self._end_kept(sequence, output)
        else:
            self._deliver(sequence, output)

    def _end_kept(self, sequence: RunningSequence, last: Output) -> None:
        """The request has its whole answer; what is to be kept of its states is."""
        if sequence.finish_reason is not None:
            return
        if sequence.keep == "end":
            sequence.snapshot = self.executor.snapshot(sequence)
        if self.scheduler.turn_due(sequence.request):
            self.scheduler.keep_prefix(sequence.request, sequence.fed(0, sequence.request.held))
        self.end(sequence, last)

    def end(self, sequence: RunningSequence, last: Output) -> None:
        """Free what a request has, with `last` as its last Output. Does nothing if it has ended already."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason, sequence.matcher = last.finish_reason, None
        self.on_end(sequence)
        self.scheduler.finish(sequence.request)
        del self.sequences[sequence.request]
        self.metrics.requests[str(last.finish_reason)] += 1
        if len(sequence.tokens) > 1:
            seconds = self.clock() - sequence.first_token_at
            self.metrics.tpot.observe(seconds / (len(sequence.tokens) - 1))
        self._deliver(sequence, last)

    def _deliver(self, sequence: RunningSequence, output: Output) -> None:
        try:
            sequence.on_output(output)
        except Exception:
            log.exception("the callback of a request failed; the request is cancelled")
            self.end(sequence, Output(None, finish_reason="cancelled"))
