"""How many prompt tokens a step may take beside the sequences that decode: they wait for the prompt's part of it.

By default so many that such a step takes about twice as long as one without a prompt: a step's time has a part that
every decoding sequence adds to, so the more of them, the longer the prompt's part may be. With a time per output token
to keep (`--tpot-ms`), as many as fit into it, by the times of the steps so far:

    seconds = plain(sequences) + prompt tokens * per_token
"""

from __future__ import annotations

import math

TILE = 64  # tokens: the products of a call are computed in tiles of rows
SPARE = 8  # tokens that a captured call may need for its padding (calls.py)
LEAST = 32  # a prompt goes on, whatever the steps take
NEW = 0.2  # weight of a new time in the means
GROUP = 8  # batch sizes whose plain steps count as one


def usual_prompt_tokens(decoding: int) -> int:
    """On a GPU. Measured on an H200 with jet-2b (docs/performance/h200.md); whole tiles, with the decoding rows."""
    wanted = max(512.0, 288 + 4.5 * decoding)
    return math.ceil((wanted + decoding) / TILE) * TILE - SPARE - decoding


class Pacing:
    """Not thread-safe: only the stepping thread calls it."""

    def __init__(self, tpot_ms: float | None = None) -> None:
        """`tpot_ms`: milliseconds of a step that decodes, at most."""
        self.seconds = None if tpot_ms is None else tpot_ms / 1e3
        self.plain: dict[int, float] = {}  # group of batch sizes -> mean seconds of a step without prompts
        self.per_token = 0.0  # seconds that a prompt token adds; 0: not seen yet

    def prompt_tokens(self, decoding: int) -> int:
        """The most prompt tokens of a step in which so many sequences decode."""
        usual = usual_prompt_tokens(decoding)
        plain = self._plain(decoding)
        if self.seconds is None or plain is None:
            return usual
        if not self.per_token:
            return min(usual, LEAST)
        return max(LEAST, int((self.seconds - plain) / self.per_token))

    def _plain(self, decoding: int) -> float | None:
        group = decoding // GROUP
        return self.plain[min(self.plain, key=lambda g: abs(g - group))] if self.plain else None

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step took so long; what it waited for the host counts, as it does for those who read the tokens."""
        if not decoding:
            return
        if not prompt_tokens:
            group = decoding // GROUP
            self.plain[group] = mean(self.plain.get(group, 0.0), seconds)
        elif (plain := self._plain(decoding)) is not None and seconds > plain:
            self.per_token = mean(self.per_token, (seconds - plain) / prompt_tokens)


def mean(before: float, new: float) -> float:
    return before + NEW * (new - before) if before else new
