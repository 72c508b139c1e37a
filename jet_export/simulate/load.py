"""The load: requests that arrive, from a trace or drawn at random, and the tokens that they share."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from jet_export.utils.errors import JetExportError


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the load. `blocks`: ids of the prompt's blocks of `BLOCK` tokens, where equal ids are equal prompts
    up to there; `session`: requests of one session continue each other, prompt and answer."""

    at: float  # seconds
    prompt: int  # tokens
    output: int  # tokens
    session: str = ""
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Log-normal numbers of tokens: a mean, and sigma of the logarithm; 0: all alike."""

    mean: float
    sigma: float = 0.5
    least: int = 1
    most: int = 1 << 30

    def draw(self, rng: random.Random) -> int:
        if not self.sigma:
            return max(self.least, min(self.most, round(self.mean)))
        drawn = rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return max(self.least, min(self.most, round(drawn)))


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Requests that arrive independently of each other."""

    rate: float  # a second
    requests: int
    prompt: Lengths
    output: Lengths
    seed: int = 0
    turns: int = 1  # of a session
    think: float = 10.0  # seconds between two turns' arrivals, on average

    def draw(self) -> list[Arrival]:
        """In order of arrival. Sessions begin at rate / turns, so that requests arrive at `rate`."""
        if self.rate <= 0 or self.requests < 1 or self.turns < 1:
            raise JetExportError(
                f"simulate: a rate of {self.rate}/s, {self.requests} requests, {self.turns} turns.",
                "All must be positive.",
            )
        rng, now, out = random.Random(self.seed), 0.0, list[Arrival]()
        for number in range(-(-self.requests // self.turns)):
            now += rng.expovariate(self.rate / self.turns)
            at, held = now, 0
            for _ in range(self.turns):
                prompt, output = self.prompt.draw(rng), self.output.draw(rng)
                out.append(Arrival(at, held + prompt, output, f"s{number}" if self.turns > 1 else ""))
                held += prompt + output
                at += rng.expovariate(1 / self.think)
        out.sort(key=lambda a: a.at)
        return out[: self.requests]


def fitted(load: Sequence[Arrival], max_seq_len: int) -> tuple[list[Arrival], int]:
    """The requests that an engine of this length takes, and how many others there are."""
    kept = [a for a in load if a.prompt + a.output <= max_seq_len]
    return kept, len(load) - len(kept)


def sped_up(load: Sequence[Arrival], times: float) -> list[Arrival]:
    """The same requests, arriving `times` as fast."""
    return [Arrival(a.at / times, a.prompt, a.output, a.session, a.blocks) for a in load]
