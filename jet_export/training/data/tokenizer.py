"""The teacher's tokenizer, checked against its vocabulary."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path

from jet_export.model.config import JetNemotronConfig
from jet_export.model.hf_files import TOKENIZER, tokenizer_directory
from jet_export.training.data.shard import Encode
from jet_export.training.data.stream import encoder
from jet_export.utils.errors import JetExportError

REMEMBERED = 50_000_000  # tokens, of 4 bytes


class Remembering:
    """An encoder that tokenises a text once: of a small corpus, which a run reads many times. What it keeps is bounded:
    texts that come once `limit` tokens are kept are tokenised each time."""

    def __init__(self, encode: Encode, limit: int = REMEMBERED) -> None:
        self.encode, self.left = encode, limit
        self._known: dict[bytes, array[int]] = {}

    def __call__(self, text: str) -> list[int]:
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            return known.tolist()
        ids = self.encode(text)
        if len(ids) <= self.left:
            self._known[key] = array("i", ids)
            self.left -= len(ids)
        return ids


def load_encoder(directory: Path, config: JetNemotronConfig) -> Encode:
    """Raises JetExportError where there is no tokenizer.json, or one with more tokens than the model has."""
    from tokenizers import Tokenizer

    path = tokenizer_directory(directory) / TOKENIZER
    if not path.is_file():
        raise JetExportError(
            f"{directory}: no {TOKENIZER}.",
            "Put the teacher's tokenizer there, or set data.tokenizer to its directory.",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise JetExportError(f"{path}: not a tokenizer ({e}).", "Download it again.") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= config.vocab_size:
        raise JetExportError(
            f"{path}: its largest token is {largest}, and the teacher's vocabulary has {config.vocab_size}.",
            "Use the tokenizer that belongs to the teacher.",
        )

    def ids(text: str) -> list[int]:
        # of a batch of one: unlike encode it leaves Python to the other shards' threads, and keeps no offsets
        found: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return found

    return Remembering(encoder(ids, config.eos_token_id))
