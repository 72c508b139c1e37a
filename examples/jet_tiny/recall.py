"""The recall task: key-value lines scattered over real code, each queried once further down.

    K72=9183        (somewhere; the value is four random digits)
    K72?9183        (later: the model must give the four digits)

Lines stand where a line of the code ended. The distance, in tokens from "=" to "?", is log-uniform up to
MAX_DISTANCE: some answers lie inside a sliding window, the others only in carried state or full attention.
A teacher-forced argmax on all four digits equals greedy decoding being right. Guessing is right once in 10^4.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

MIN_DISTANCE, MAX_DISTANCE = 24, 1600
PAIRS = 32
ANSWER_TOKENS = 4
ANSWER_WEIGHT = 4  # of an answer's token in the training loss; lines' random parts have weight 0, code has 1


@dataclass
class RecallRow:
    tokens: np.ndarray  # [length] int32
    weights: np.ndarray  # [length] uint8, weight of each token as a target
    answers: np.ndarray  # [n, 2] int32: position of the first answer token, distance from "=" to "?"


class RecallTask:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.letters = [single_token(tokenizer, c) for c in string.ascii_uppercase]
        self.digits = [single_token(tokenizer, c) for c in string.digits]
        self.newline, self.equals, self.query = (single_token(tokenizer, c) for c in "\n=?")
        self.starts_line = np.array(
            [token.startswith("Ċ") for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
        )

    def row(self, code: np.ndarray, rng: np.random.Generator) -> RecallRow:
        """`len(code)` tokens: the beginning of `code` with up to PAIRS definitions and as many queries inserted."""
        length = len(code)
        line_starts = np.flatnonzero(self.starts_line[code])
        if len(line_starts) == 0:
            line_starts = np.array([0])
        inserted: dict[int, list[tuple[int, bool]]] = {}  # line start -> (pair, is the query)
        distances = np.exp(rng.uniform(np.log(MIN_DISTANCE), np.log(MAX_DISTANCE), PAIRS)).astype(int)
        for pair, first in enumerate(rng.integers(0, length, PAIRS)):
            # The inserted lines stretch distances by about a quarter.
            for is_query, at in ((False, first), (True, first + distances[pair] * 4 // 5)):
                place = np.searchsorted(line_starts, at)
                if place < len(line_starts):
                    inserted.setdefault(int(line_starts[place]), []).append((pair, is_query))
        keys = rng.choice(len(self.letters) * 100, PAIRS, replace=False)
        values = rng.integers(0, 10, (PAIRS, ANSWER_TOKENS))
        tokens: list[int] = []
        weights: list[int] = []
        answers: list[tuple[int, int]] = []
        defined: dict[int, int] = {}  # pair -> position of its "="
        done = 0
        for place in sorted(inserted):
            tokens += code[done:place].tolist()
            weights += [1] * (place - done)
            done = place
            for pair, is_query in inserted[place]:
                if is_query and pair not in defined:
                    continue
                letter, number = divmod(int(keys[pair]), 100)
                tokens += [self.newline, self.letters[letter], self.digits[number // 10], self.digits[number % 10]]
                if is_query:
                    answers.append((len(tokens) + 1, len(tokens) - defined[pair]))
                else:
                    defined[pair] = len(tokens)
                tokens += [self.query if is_query else self.equals, *(self.digits[d] for d in values[pair])]
                weights += [0] * 5 + [ANSWER_WEIGHT if is_query else 0] * ANSWER_TOKENS
        tokens += code[done:].tolist()
        weights += [1] * (length - done)
        complete = [a for a in answers if a[0] + ANSWER_TOKENS <= length]
        return RecallRow(
            np.array(tokens[:length], dtype=np.int32),
            np.array(weights[:length], dtype=np.uint8),
            np.array(complete, dtype=np.int32).reshape(-1, 2),
        )

    def rows(self, stream: np.ndarray, count: int, length: int, seed: int) -> list[RecallRow]:
        """`count` rows of `length` tokens over random windows of the token stream `stream`."""
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, max(1, len(stream) - length), count)
        return [self.row(stream[s : s + length], rng) for s in starts]


def single_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text).ids
    if len(ids) != 1:
        raise ValueError(f"The recall task needs {text!r} to be one token, the tokenizer makes {len(ids)} of it.")
    return ids[0]
