"""The requests of a load test, and what the engine's own speeds would allow them."""

from __future__ import annotations

import argparse
import math
import random

from load_clients import CLOCK, LoadRequest
from serving_options import params_of

from jet_export.backends.base import Engine
from jet_export.bench.ideal import Ideal, Speeds, batch_sizes, measure_speeds, simulate

SIGMA = 0.5


class Workload:
    """Sequences of requests that depend on the seed only, and the speeds of the engine that is to run them."""

    def __init__(
        self, args: argparse.Namespace, vocab: int, max_seq_len: int, speeds: Speeds, max_batch_size: int
    ) -> None:
        self.args, self.vocab, self.max_seq_len, self.speeds = args, vocab, max_seq_len, speeds
        self.slots = args.slots or max_batch_size

    def requests(self, n: int, seed: int) -> list[LoadRequest]:
        rng = random.Random(f"{self.args.seed} {seed}")
        means = self.args.prompt_tokens, self.args.output_tokens
        return [self.request(rng, *(self._length(rng, mean) for mean in means)) for _ in range(n)]

    def request(self, rng: random.Random, prompt: int, new: int) -> LoadRequest:
        new = min(new, self.max_seq_len - 1)
        prompt = min(prompt, self.max_seq_len - new)
        return LoadRequest([rng.randrange(self.vocab) for _ in range(prompt)], new, params_of(self.args, new, prompt))

    def ideal(self, requests: list[LoadRequest], most: int, due: list[float] | None = None) -> Ideal:
        """Of requests of which at most `most` are sent at once."""
        sizes = [(len(r.prompt), r.new) for r in requests]
        return simulate(sizes, slots=min(most, self.slots), speeds=self.speeds, due=due)

    def in_steps(self, ms: dict[str, float], rows: int) -> dict[str, float]:
        """Milliseconds as multiples of a plain decode step of `rows` rows."""
        step = 1e3 * self.speeds.step(min(rows, self.slots))
        return {name: round(value / step, 2) for name, value in ms.items()}

    def _length(self, rng: random.Random, mean: float) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)))


def speeds_of(engine: Engine, args: argparse.Namespace) -> Speeds:
    """Measured on an engine that nothing else uses yet."""
    held = args.held_tokens or args.prompt_tokens + args.output_tokens // 2
    slots = args.slots or engine.limits.max_batch_size
    most = min(slots, max(*args.concurrency, args.join_streams))
    sizes = {*batch_sizes(most), *(min(n, most) for n in (*args.concurrency, args.join_streams))}
    speeds = measure_speeds(engine, sizes, held_tokens=held, now=CLOCK.now)
    print(speeds.describe(), flush=True)
    return speeds
