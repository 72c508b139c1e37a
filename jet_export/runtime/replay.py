"""Drafts replayed from recorded answers, each token right with a stated probability: for measurements and tests."""

from __future__ import annotations

from collections.abc import Sequence

from jet_export.runtime.prompt_lookup import Match
from jet_export.runtime.sequence import RunningSequence

Asked = tuple[tuple[int, ...], int, int]  # prompt, seed, choice


MASK = 2**64 - 1


def hashed(seed: int, position: int, i: int) -> int:
    """64 bits that look random: the last step of SplitMix64 (Steele et al., 2014). A generator would have to be seeded
    for each token, and the steps that are measured would wait for that."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + i * 0x8CB92BA72F3D8DD7 + 1) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


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
        self.running: dict[RunningSequence, list[int]] = {}  # of its prompt, which takes long to look up
        self.record(recorded)
        self.acceptance, self.vocab = acceptance, vocab

    def record(self, answered: Sequence[RunningSequence]) -> None:
        self.answers |= {asked(s): list(s.tokens) for s in answered}
        self.running.clear()

    def forget(self, sequence: RunningSequence) -> None:
        self.running.pop(sequence, None)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        if (answer := self.running.get(sequence)) is None:
            answer = self.running[sequence] = self.answers.get(asked(sequence), [])
        first, seed, draft, right = sequence.position, sequence.params.sampling.seed, [], self.acceptance * 2**64
        for i, token in enumerate(answer[first : first + most]):
            bits = hashed(seed, first, i)
            draft.append(token if bits < right else (token + 1 + bits % 7) % self.vocab)
        return Match(draft, 0)

    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: object) -> list[list[int]]:
        return [offer.tokens for offer in offers]
