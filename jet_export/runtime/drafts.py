"""Speculative decoding: tokens are drafted, and verified by one call that runs all of them.

Drafts never change an answer. The noise of a draw is that of its position, so a verifying step samples every position
of a sequence as plain decoding would, and a drafted token counts where it is the one that was sampled: a sequence gets
the tokens s_0 ... s_a, a being the number of leading drafted tokens that were right. What the others have left in the
states is cut off by the next call's smaller context length. For a draft that is one token a position this is
rejection sampling: the token is accepted with its probability.

A proposer makes the drafts (prompt lookup here, a draft bundle in draft_model.py, a layer of the bundle in
mtp_draft.py), draft_length.py says how long they may be. Penalties and grammars, by which the choice of a token depends
on those before it, are those of each position: as if the draft before it were right, since otherwise its draw does not
count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jet_export.backends.base import Engine
from jet_export.model.cache import PAGE
from jet_export.runtime.acceptance import Acceptance, SequenceAcceptance
from jet_export.runtime.capacity import Serving
from jet_export.runtime.draft_length import Candidate, DraftLengths
from jet_export.runtime.draft_model import Draw
from jet_export.runtime.plan import Request
from jet_export.runtime.prompt_lookup import Match, PromptLookup
from jet_export.runtime.sequence import RunningSequence
from jet_export.utils.errors import JetExportError

MODES = ("off", "lookup", "mtp")
QUIET, HOPE = 64, 0.9  # after so many steps without drafts of a proposer that does not guess, this is the least rate
IDLE = 64  # steps without a look for drafts, where none could pay


class Proposer(Protocol):
    """Makes drafts. Only the thread that takes the steps calls it."""

    guesses: bool  # it can say at no cost what it would draft: also for steps that then have no drafts

    def forget(self, sequence: RunningSequence) -> None:
        """The sequence takes a slot, or has ended."""

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        """A draft of up to `most` tokens behind those that are known; where it `guesses` not, only its length and kind
        count."""

    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: Draw) -> list[list[int]]:
        """The drafts of a step, as long as the offers, which may have been shortened, or empty."""


@dataclass
class LookedUp:
    """The index of a sequence, and how many tokens of its answer are in it."""

    index: PromptLookup
    known: int


class LookupProposer:
    """Prompt lookup."""

    guesses = True

    def __init__(self) -> None:
        self.indexes: dict[RunningSequence, LookedUp] = {}

    def forget(self, sequence: RunningSequence) -> None:
        self.indexes.pop(sequence, None)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        found = self.indexes.get(sequence)
        if found is None:
            tokens = [*sequence.prompt, *sequence.tokens[: sequence.position]]
            found = self.indexes[sequence] = LookedUp(PromptLookup(tokens), sequence.position)
        for token in sequence.tokens[found.known : sequence.position]:
            found.index.append(token)
        found.known = sequence.position
        return found.index.propose(most)

    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: Draw) -> list[list[int]]:
        return [offer.tokens for offer in offers]


@dataclass
class Expected:
    """What is expected to come behind the first `position` tokens of an answer."""

    position: int
    draft: Match


@dataclass
class History:
    """What is known of a sequence's drafts."""

    acceptance: SequenceAcceptance
    expected: Expected | None = None


class Speculation:
    """The drafts of a BatchingEngine. Only the thread that takes the steps calls it, under the engine's lock.

    `most`: tokens of a draft. `fixed`: the drafts of a request depend on its tokens alone, not on times or free pages.
    """

    def __init__(
        self, proposer: Proposer, most: int, *, fixed: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.proposer, self.most, self.fixed, self.clock = proposer, most, fixed, clock
        self.lengths = DraftLengths(fixed=fixed)
        self.acceptance = Acceptance()
        self.histories: dict[RunningSequence, History] = {}
        self.quiet = 0  # steps without drafts since the last one with them
        self.proposed = False  # the proposer has worked for the step that was planned last
        self.looked = 0.0  # seconds that `drafts` or `likely` looked for drafts, whichever was called last
        self.idle: dict[int, int] = {}  # sequences of a step, to a factor of two -> steps to go without looking

    def begin(self, sequence: RunningSequence) -> None:
        """It takes a slot: with `fixed`, what it is offered does not depend on what it had before it was preempted."""
        self.proposer.forget(sequence)
        if self.fixed:
            self.histories.pop(sequence, None)

    def end(self, sequence: RunningSequence) -> None:
        self.proposer.forget(sequence)
        self.histories.pop(sequence, None)

    def drafts(self, sequences: Sequence[RunningSequence], draw: Draw, prompt_tokens: int = 0) -> list[list[int]]:
        """Of a step in which these sequences decode, all of whose tokens are known, beside so many tokens of prompts;
        [] for one without."""
        found, offers = self._offers(sequences, 0, prompt_tokens)
        self.proposed = bool(found)
        drafts: list[list[int]] = [[] for _ in sequences]
        if found:
            made = self.proposer.draft([sequences[i] for i in found], offers, draw)
            for i, offer, draft in zip(found, offers, made, strict=True):
                drafts[i] = draft = draft[: valid(sequences[i], draft)]
                if draft and not self.proposer.guesses:
                    position = sequences[i].position
                    self.histories[sequences[i]].expected = Expected(position, Match(draft, offer.size))
        return drafts

    def likely(self, sequences: Sequence[RunningSequence], prompt_tokens: int = 0) -> bool:
        """Whether the next step should have drafts, while one token of each sequence is still to come."""
        return bool(self._offers(sequences, 1, prompt_tokens)[0])

    def _offers(
        self, sequences: Sequence[RunningSequence], unknown: int, prompt_tokens: int
    ) -> tuple[list[int], list[Match]]:
        """The sequences to draft for, and their offers, without the first `unknown` tokens."""
        self.looked = 0.0
        if not self._looks(len(sequences)):
            return [], []
        began = self.clock()
        chosen = self._look(sequences, unknown, prompt_tokens)
        self.looked = self.clock() - began
        return [i for i, _ in chosen], [offer for _, offer in chosen]

    def _look(self, sequences: Sequence[RunningSequence], unknown: int, prompt_tokens: int) -> list[tuple[int, Match]]:
        hopeful = not self.proposer.guesses and self.quiet >= QUIET
        found, offers, candidates = [], [], []
        for i, sequence in enumerate(sequences):
            most = self.room(sequence)
            if most < 1:
                continue
            history = self._history(sequence)
            offer = self.proposer.offer(sequence, most + unknown)
            if self.proposer.guesses and sequence.matcher is not None:
                offer = Match(offer.tokens[: valid(sequence, offer.tokens)], offer.size)
            self._learn(sequence, history, offer)
            offer = Match(offer.tokens[unknown:], offer.size)
            if offer.tokens:
                found.append(i)
                offers.append(offer)
                rate = history.acceptance.rate(offer.size)
                candidates.append(Candidate(len(offer.tokens), max(rate, HOPE) if hopeful else rate))
        lengths = self.lengths.choose(candidates, len(sequences), prompt_tokens)
        self.quiet = 0 if any(lengths) else self.quiet + 1
        return [(i, Match(o.tokens[:n], o.size)) for i, o, n in zip(found, offers, lengths, strict=True) if n]

    def _looks(self, rows: int) -> bool:
        if not rows or not self.lengths.may_look(rows):
            return False
        key = rows.bit_length()
        if self.idle.get(key, 0):
            self.idle[key] -= 1
            return False
        if self.lengths.could_pay(rows, self.most):
            return True
        self.idle[key] = IDLE if self.lengths.times.seconds(rows, 0) is not None else 0
        return False

    def _history(self, sequence: RunningSequence) -> History:
        if sequence not in self.histories:
            self.histories[sequence] = History(self.acceptance.of_sequence())
        return self.histories[sequence]

    def _learn(self, sequence: RunningSequence, history: History, offer: Match) -> None:
        """Compare what was expected with what came; then expect the offer."""
        last = history.expected
        if last is not None and last.position < sequence.position:
            came = sequence.tokens[last.position : sequence.position]
            history.acceptance.observe(last.draft.size, last.draft.tokens, came)
            history.expected = None
        if self.proposer.guesses and history.expected is None and offer.tokens:
            history.expected = Expected(sequence.position, offer)

    def room(self, sequence: RunningSequence) -> int:
        """Tokens that can be drafted for it: none that it may not have, and none that needs a page of its own."""
        request = sequence.request
        if sequence.finish_reason is not None:
            return 0
        return min(self.most, request.max_held - request.held - 1, page_room(request, self.fixed))


def valid(sequence: RunningSequence, draft: list[int]) -> int:
    """How many tokens of a draft its grammar allows, one after the other."""
    return len(draft) if sequence.matcher is None else sequence.matcher.valid(draft)


def page_room(request: Request, fixed: bool) -> int:
    """Tokens behind the next one that its pages have room for; `fixed`: its page, however many it has."""
    held = request.held
    return PAGE - held % PAGE - 1 if fixed else len(request.pages) * PAGE - held - 1


def speculation(
    engine: Engine, serving: Serving, proposer: Proposer | None = None, clock: Callable[[], float] = time.monotonic
) -> Speculation | None:
    """As `serving` asks; `proposer`, by default prompt lookup, makes the drafts. None: there are none.

    Raises JetExportError for an engine that verifies none, or fewer than asked for."""
    if serving.speculate not in MODES:
        raise JetExportError(f"speculate is {serving.speculate!r}.", f"Give one of {', '.join(MODES)}.")
    if serving.speculate != "off" and serving.draft is not None:
        raise JetExportError("speculate and draft both draft tokens.", "Give one of them.")
    if proposer is None and serving.speculate == "off":
        if serving.drafts is not None:
            raise JetExportError("drafts without speculate.", "Say how to draft: speculate lookup, or a draft bundle.")
        return None
    most = engine.rollback - 1
    if most < 1:
        raise JetExportError("speculate: the bundle verifies no drafts.", "Build it with --speculate N.")
    if serving.drafts is not None and not 1 <= serving.drafts <= most:
        raise JetExportError(
            f"drafts is {serving.drafts}; the bundle verifies 1 to {most}.",
            "Ask for fewer, or build with --speculate N.",
        )
    return Speculation(proposer or LookupProposer(), serving.drafts or most, fixed=serving.deterministic, clock=clock)
