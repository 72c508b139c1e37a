"""jet-tiny's recall task by distance: `K72=9183` once in real code, later `K72?`, to be followed by 9183.

The distance is counted in tokens from "=" to "?". A document is right where all tokens of the answer are the most
likely ones, which is where greedy decoding is right. Guessing is right once in 10^4.
"""

from __future__ import annotations

import random
import string
from typing import Any

from jet_export.evaluation.tasks.settings import Documents, TaskSettings, by_length, token_counts

COUNT = 100  # documents of each distance
SHORTEST = 64
BEFORE = 48  # tokens of code before the definition
OTHERS = 3  # definitions of other keys on the way
LINE_TOKENS = 10  # of a definition, about


def by_distance(**metadata: Any) -> Documents:
    """Documents whose distances are at most each length, and more than half of it."""
    settings = TaskSettings.of(metadata)
    rows = settings.read_text().splitlines()
    counts = token_counts(settings.tokenizer, rows)
    most = min(settings.max_length - BEFORE - 4 * LINE_TOKENS, sum(counts) // 2)
    lengths = tuple(n for n in settings.lengths_from(SHORTEST) if n <= most) or (most,)
    return by_length(lengths, COUNT, "recall", lambda rng, n: _document(rng, n, rows, counts))


def _document(rng: random.Random, length: int, rows: list[str], counts: list[int]) -> dict[str, Any]:
    keys = rng.sample([f"{c}{i:02}" for c in string.ascii_uppercase for i in range(100)], 1 + OTHERS)
    values = [f"{rng.randrange(10000):04}" for _ in keys]
    distance = round(length * rng.uniform(0.55, 0.95))
    code = max(distance - (1 + OTHERS) * LINE_TOKENS, 0)
    first = rng.randrange(len(rows))
    before, at = _take(rows, counts, first, BEFORE)
    between, _ = _take(rows, counts, at, code)
    for key, value in zip(keys[1:], values[1:], strict=True):
        between.insert(rng.randint(0, len(between)), f"{key}={value}")
    context = "\n".join([*before, f"{keys[0]}={values[0]}", *between, f"{keys[0]}?"])
    return {"context": context, "answer": values[0]}


def _take(rows: list[str], counts: list[int], first: int, tokens: int) -> tuple[list[str], int]:
    """Lines of up to so many tokens from `first` on, around the end of the text, and where they end."""
    taken: list[str] = []
    while tokens >= counts[first]:
        tokens -= counts[first]
        taken.append(rows[first])
        first = (first + 1) % len(rows)
    return taken, first


def score(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    right = float(results[0][1])
    return {"recall": right, f"recall_{document['length']}": right}
