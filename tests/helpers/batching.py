"""Run one request among others, with its logits kept, to compare results to the bit."""

import random

import pytest
import torch
from torch.nn.functional import linear

from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.params import Params
from jet_export.runtime.sequence import RunningSequence


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(0, 128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def require_placeless_rows(model: torch.nn.Module, rows: int) -> None:
    """Skip on a CPU whose BLAS gives a row of a product other bits in another place of the batch: a request's bits then
    follow its row. MKL's fp32 kernels for Intel CPUs with AVX2 do."""
    for w in {x.shape: x for x in model.parameters() if x.ndim == 2 and x.is_floating_point() and x.is_cpu}.values():
        x = torch.randn(rows, w.shape[1], generator=torch.Generator().manual_seed(0)).to(w.dtype)
        y = linear(x, w)
        if not all(torch.equal(linear(x.roll(i, 0), w), y.roll(i, 0)) for i in range(1, rows)):
            pytest.skip(f"on this CPU the bits of a row times a weight of {list(w.shape)} depend on the row's place")


def among_others(
    engine: BatchingEngine, prompt: list[int], others: list[tuple[list[int], int]], at: int
) -> RunningSequence:
    """Run `prompt` among others (prompt, new tokens): one arrives each step, `prompt` as number `at`."""
    asked = [*others[:at], (prompt, 8), *others[at:]]
    running = []
    for row, new in asked:
        running.append(engine.submit(row, Params(new), lambda _: None, keep_logits=row is prompt))
        engine.step()
    while engine.step():
        pass
    return running[at]


def repeats(make, prompt: list[int], runs: int, longest: int = 140) -> list[RunningSequence]:
    """Repeated runs of one prompt: alone, then among 1 to `slots` - 1 others of random lengths, in random order.

    `make` creates a BatchingEngine; every fifth run uses a new one.
    """
    rng, out = random.Random(0), []
    engine = make()
    for i in range(runs):
        n = i % engine.scheduler.capacity.slots
        others = [(tokens(rng.randint(1, longest), 50 + i + j), rng.randint(1, 12)) for j in range(n)]
        if i % 5 == 4:
            engine = make()
        out.append(among_others(engine, prompt, others, rng.randint(0, n)))
    return out


def distinct(runs: list[RunningSequence]) -> int:
    return len({(tuple(s.tokens), torch.stack(s.logits).numpy().tobytes()) for s in runs})
