"""What a local task is generated for, and the text that it is made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import DATA

HELD_OUT = DATA / "heldout.txt"
SHORTEST, LONGEST = 64, 131072  # tokens of a default length
Documents = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Metadata for the harness. `max_length`: the most tokens of a document, its answer included."""

    bundle: str
    max_length: int
    lengths: tuple[int, ...] = ()  # tokens; () are the powers of two up to max_length
    text: str = ""  # a file; "" is heldout.txt

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> TaskSettings:
        """Metadata as the harness hands it over, with keys of its own."""
        values = {k: v for k, v in metadata.items() if k in cls.__dataclass_fields__}
        return cls(**{**values, "lengths": tuple(values.get("lengths", ()))})

    def metadata(self) -> dict[str, Any]:
        return {**asdict(self), "lengths": list(self.lengths)}

    @property
    def tokenizer(self) -> Tokenizer | ByteTokenizer:
        return load_tokenizer(self.bundle)

    def read_text(self) -> str:
        """Raises JetExportError for a file that is not UTF-8 text."""
        path = Path(self.text) if self.text else HELD_OUT
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise JetExportError(f"--text {path}: not UTF-8 (byte {e.start}).") from None
        except OSError as e:
            raise JetExportError(f"--text {path}: {e.strerror}.") from None
        if not text.strip():
            raise JetExportError(f"--text {path}: no text in it.")
        return text

    def lengths_from(self, shortest: int) -> tuple[int, ...]:
        """`lengths`, or the powers of two from `shortest` on. Raises JetExportError where one is too long."""
        if not self.lengths:
            powers = [2**i for i in range(20)]
            found = tuple(n for n in powers if shortest <= n <= min(self.max_length, LONGEST))
            if not found:
                raise JetExportError(
                    f"A task has documents of {shortest} tokens or more; the bundle's max_seq_len leaves room for "
                    f"{self.max_length}.",
                    "Build with a larger --max-seq-len, or leave the task out.",
                )
            return found
        for n in self.lengths:
            if not SHORTEST <= n <= self.max_length:
                raise JetExportError(
                    f"--lengths {n}: not between {SHORTEST} and {self.max_length}, the bundle's max_seq_len less one."
                )
        return self.lengths


def documents(rows: list[dict[str, Any]]) -> Documents:
    """The rows as the harness's `test` split."""
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def by_length(
    lengths: tuple[int, ...], count: int, seed: str, make: Callable[[random.Random, int], dict[str, Any]]
) -> Documents:
    """`count` documents of each length, in turns, so that the first ones are of every length (--limit)."""
    rngs = {n: random.Random(f"{seed} {n}") for n in lengths}
    return documents([{"length": n, **make(rngs[n], n)} for _ in range(count) for n in lengths])


def token_counts(tokenizer: Tokenizer | ByteTokenizer, lines: list[str]) -> list[int]:
    """Tokens of each line with its newline, encoded alone."""
    return [len(tokenizer.encode(f"{line}\n", special_tokens=False)) for line in lines]
