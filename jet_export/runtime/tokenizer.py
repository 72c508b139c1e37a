"""Text to token ids and back: a bundle's tokenizer.json, or raw bytes for a model without one (random weights)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from jet_export.model.hf_files import TOKENIZER, tokenizer_directory
from jet_export.utils.errors import JetExportError, shown
from jet_export.utils.schema import read_json_object

MAX_HELD_BACK = 16  # tokens that TextStream holds back for the end of a character, which has at most 4 bytes


class Tokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HfTokenizer

        try:
            self._tokenizer = HfTokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises bare Exception
            raise JetExportError(f"{path}: not a tokenizer.json ({str(e)[:300]}).") from None

    @property
    def largest_id(self) -> int:
        """Of all tokens, those that were added to its vocabulary included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `decode` leaves out, such as ends of turns."""
        return frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that stand beside the vocabulary of pieces of text, such as <|endoftext|>, and their ids."""
        return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}

    def to_json(self) -> str:
        """As a tokenizer.json has it."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """`special_tokens`: add those that the tokenizer puts around a text; a chat template brings its own."""
        return self._tokenizer.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def decode_with_special(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def pieces(self, ids: list[int]) -> list[str]:
        """The tokens as the vocabulary spells them."""
        return [self._tokenizer.id_to_token(i) or "" for i in ids]


class ByteTokenizer:
    """UTF-8 bytes as ids, for models without a tokenizer; ids above 255 decode to their number in brackets."""

    special_ids: frozenset[int] = frozenset()
    added_tokens: ClassVar[dict[str, int]] = {}

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces(ids))

    def decode_with_special(self, ids: list[int]) -> str:
        return self.decode(ids)

    def pieces(self, ids: list[int]) -> list[str]:
        return [chr(i) if 32 <= i < 127 else f"[{i}]" for i in ids]


def load_tokenizer(directory: str | Path) -> Tokenizer | ByteTokenizer:
    path = tokenizer_directory(directory) / TOKENIZER
    return Tokenizer(path) if path.is_file() else ByteTokenizer()


def load_eos(directory: str | Path, default: int, vocab: int) -> tuple[int, ...]:
    """End-of-sequence tokens: those of generation_config.json, an id or a list, else the model's (`default`).

    Raises JetExportError for anything else there."""
    path = Path(directory) / "generation_config.json"
    found = read_json_object(path).get("eos_token_id")
    if found is None:
        return (default,)
    ids = found if isinstance(found, list) else [found]
    if any(type(i) is not int or not 0 <= i < vocab for i in ids):
        raise JetExportError(
            f"{path}: eos_token_id {shown(found)} is not in the vocabulary of {vocab}.",
            "Give a token id, or a list of them.",
        )
    return tuple(ids)


class TextStream:
    """Streaming detokenizer: returns text as soon as no later token can change it."""

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.done = 0  # tokens whose text has been returned
        self.start = 0  # a few tokens before `done`: decoding depends on the neighbours

    def push(self, token: int) -> str:
        self.ids.append(token)
        before = self.tokenizer.decode(self.ids[self.start : self.done])
        now = self.tokenizer.decode(self.ids[self.start :])
        if now.endswith("�") and len(self.ids) - self.done < MAX_HELD_BACK:  # the middle of a character
            return ""
        self.start, self.done = self.done, len(self.ids)
        return now[len(before) :]

    def flush(self) -> str:
        """The text held back, when no more tokens come."""
        before = self.tokenizer.decode(self.ids[self.start : self.done])
        now = self.tokenizer.decode(self.ids[self.start :])
        self.start, self.done = self.done, len(self.ids)
        return now[len(before) :]


class StopText:
    """A TextStream that ends before the first stop string. Text that may begin one is held back."""

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer, stop: Sequence[str]) -> None:
        self.stream, self.stop = TextStream(tokenizer), stop
        self.held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is now final, whether a stop string ended it)."""
        return self._cut(self.stream.push(token))

    def flush(self) -> tuple[str, bool]:
        text, stopped = self._cut(self.stream.flush())
        text, self.held = text + self.held, ""
        return text, stopped

    def _cut(self, text: str) -> tuple[str, bool]:
        if not self.stop:
            return text, False
        self.held += text
        found = [i for s in self.stop if (i := self.held.find(s)) >= 0]
        if found:
            text, self.held = self.held[: min(found)], ""
            return text, True
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text, False
