"""Drafts replayed from recorded answers, each token right with a stated probability: for measurements and tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jet_export.runtime.prompt_lookup import Match
from jet_export.runtime.sequence import RunningSequence

Asked = tuple[tuple[int, ...], int, int]  # prompt, seed, choice


def asked(sequence: RunningSequence) -> Asked:
    return tuple(sequence.prompt), sequence.params.sampling.seed, sequence.choice


class ReplayProposer:
    """Proposes what sequences answered when they were recorded.

    `acceptance`: the probability that a drafted token is right, whatever those before it are; a wrong one is a token
    a little further on in the vocabulary. Drafts depend on the request and the position only.
    """

    guesses = True

    def __init__(self, recorded: Sequence[RunningSequence], acceptance: float, vocab: int) -> None:
        self.answers: dict[Asked, list[int]] = {}
        self.record(recorded)
        self.acceptance, self.vocab = acceptance, vocab

    def record(self, answered: Sequence[RunningSequence]) -> None:
        self.answers |= {asked(s): list(s.tokens) for s in answered}

    def forget(self, sequence: RunningSequence) -> None:
        pass

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        first, draft = sequence.position, []
        for i, token in enumerate(self.answers.get(asked(sequence), [])[first : first + most]):
            rng = random.Random(hash((sequence.params.sampling.seed, first, i)))
            draft.append(token if rng.random() < self.acceptance else (token + 1 + rng.randrange(7)) % self.vocab)
        return Match(draft, 0)

    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: object) -> list[list[int]]:
        return [offer.tokens for offer in offers]
