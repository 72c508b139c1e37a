"""Text to token ids and back: a bundle's tokenizer.json, or raw bytes where a model has none (random weights)."""

from __future__ import annotations

from pathlib import Path

from jet_export.bundle import TOKENIZER
from jet_export.errors import JetExportError


class Tokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HfTokenizer

        try:
            self._tokenizer = HfTokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises bare Exception
            raise JetExportError(f"{path}: not a tokenizer.json ({e}).") from None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class ByteTokenizer:
    """UTF-8 bytes as ids, for models without a tokenizer; ids above 255 decode to their number in brackets."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) if 32 <= i < 127 else f"[{i}]" for i in ids)


def load_tokenizer(directory: str | Path) -> Tokenizer | ByteTokenizer:
    path = Path(directory) / TOKENIZER
    return Tokenizer(path) if path.is_file() else ByteTokenizer()


class TextStream:
    """Text of a growing list of tokens, given out as soon as no later token can change it."""

    def __init__(self, tokenizer: Tokenizer | ByteTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.done = 0  # tokens whose text is out
        self.start = 0  # a few tokens before `done`, since decoders join neighbours

    def push(self, token: int) -> str:
        self.ids.append(token)
        before = self.tokenizer.decode(self.ids[self.start : self.done])
        now = self.tokenizer.decode(self.ids[self.start :])
        if now.endswith("�"):  # the middle of a character
            return ""
        self.start, self.done = self.done, len(self.ids)
        return now[len(before) :]
