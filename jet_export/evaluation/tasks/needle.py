"""Needles by length, of RULER's kinds (arXiv 2404.06654), generated: filler sentences, and in them what is asked for.

    single      one key with one value
    multikey    four keys with a value each, one is asked for
    multivalue  one key with four values, all are asked for
    multiquery  four keys with a value each, all are asked for
    variables   a chain of assignments, VAR A = 12345, VAR B = VAR A, ...: the variables that have the value

The score is RULER's: the share of the answers that the generated text contains. A document has at most `length` tokens
with the room for its answer.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jet_export.evaluation.tasks.settings import Documents, TaskSettings, by_length
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer

COUNT = 50  # documents of each length
SHORTEST = 512
NEW_TOKENS = 64  # the tasks' max_gen_toks
SUBJECTS = ("The river", "A train", "The old clock", "My neighbour", "The harbour", "A small bird", "The market")
VERBS = ("passes", "reaches", "crosses", "leaves", "watches over", "returns to")
PLACES = ("the town", "the hills", "the bridge", "a quiet street", "the northern road", "the garden", "the station")
TIMES = ("at dawn", "every evening", "in winter", "after the rain", "before noon", "once a week")


@dataclass(frozen=True)
class Needles:
    """What is hidden, in this order, and what is asked for."""

    sentences: list[str]
    question: str
    answers: list[str]
    in_order: bool = False  # spread as they come; otherwise shuffled


def single(**metadata: Any) -> Documents:
    return _task(metadata, "single", lambda rng: _numbers(rng, keys=1, values=1, asked=1))


def multikey(**metadata: Any) -> Documents:
    return _task(metadata, "multikey", lambda rng: _numbers(rng, keys=4, values=1, asked=1))


def multivalue(**metadata: Any) -> Documents:
    return _task(metadata, "multivalue", lambda rng: _numbers(rng, keys=1, values=4, asked=1))


def multiquery(**metadata: Any) -> Documents:
    return _task(metadata, "multiquery", lambda rng: _numbers(rng, keys=4, values=1, asked=4))


def variables(**metadata: Any) -> Documents:
    return _task(metadata, "variables", _chain)


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """RULER's string_match_all, over all lengths and for the document's."""
    found = sum(a.lower() in results[0].lower() for a in document["answers"]) / len(document["answers"])
    return {"score": found, f"score_{document['length']}": found}


def _numbers(rng: random.Random, *, keys: int, values: int, asked: int) -> Needles:
    """Magic numbers of 7 digits for keys."""
    names = rng.sample([f"{a}-{b}" for a in _WORDS for b in _WORDS if a != b], keys)
    numbers = {name: [str(rng.randrange(10**6, 10**7)) for _ in range(values)] for name in names}
    sentences = [f"One of the magic numbers for {k} is: {n}." for k, found in numbers.items() for n in found]
    wanted = names[:asked]
    listed = ", ".join(wanted)
    plural = values * asked > 1
    question = (
        f"What {'are all the magic numbers' if plural else 'is the magic number'} for {listed} in the text above?\n"
        f"The magic {'numbers' if plural else 'number'} for {listed} {'are' if plural else 'is'}:"
    )
    return Needles(sentences, question, [n for k in wanted for n in numbers[k]])


def _chain(rng: random.Random) -> Needles:
    """A chain of five variables, in order."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10**4, 10**5))
    sources = [value, *(f"VAR {n}" for n in names[:-1])]
    sentences = [f"VAR {n} = {s}." for n, s in zip(names, sources, strict=True)]
    question = (
        f"Find all variables that are assigned the value {value} in the text above.\n"
        f"The {len(names)} variables that are assigned the value {value} are: VAR"
    )
    return Needles(sentences, question, names, in_order=True)


def _task(metadata: dict[str, Any], name: str, make: Callable[[random.Random], Needles]) -> Documents:
    settings = TaskSettings.of(metadata)
    tokenizer = settings.tokenizer
    lengths = settings.lengths_from(SHORTEST)
    return by_length(lengths, COUNT, name, lambda rng, n: _document(rng, n, make(rng), tokenizer))


def _document(
    rng: random.Random, length: int, needles: Needles, tokenizer: Tokenizer | ByteTokenizer
) -> dict[str, Any]:
    def size(text: str) -> int:
        return len(tokenizer.encode(text, special_tokens=False))

    room = length - NEW_TOKENS - size(f"{' '.join(needles.sentences)}\n\n{needles.question}")
    filler: list[str] = []
    while True:  # in blocks, whose tokens are counted at once
        block = [_sentence(rng) for _ in range(16)]
        tokens = [size(f" {s}") for s in block]
        for sentence, n in zip(block, tokens, strict=True):
            room -= n
            if room < 0:
                return _spread(rng, filler, needles)
            filler.append(sentence)


def _spread(rng: random.Random, filler: list[str], needles: Needles) -> dict[str, Any]:
    places = sorted(rng.randint(0, len(filler)) for _ in needles.sentences)
    hidden = list(needles.sentences)
    if not needles.in_order:
        rng.shuffle(hidden)
    for at, sentence in zip(reversed(places), reversed(hidden), strict=True):
        filler.insert(at, sentence)
    return {"input": f"{' '.join(filler)}\n\n{needles.question}", "answers": needles.answers}


def _sentence(rng: random.Random) -> str:
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(PLACES)} {rng.choice(TIMES)}."


_WORDS = (
    "amber", "birch", "canyon", "delta", "ember", "falcon", "granite", "harvest", "island", "juniper", "kernel",
    "lantern", "meadow", "nectar", "orchid", "pebble", "quartz", "ribbon", "saddle", "timber", "umbrella", "velvet",
    "willow", "yonder", "zephyr",
)  # fmt: skip
