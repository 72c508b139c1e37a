"""Token streams from the corpus, training batches from the streams, all on the training device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from jet_tiny import corpus
from jet_tiny.recall import RecallTask

RECALL_SHARE = 1 / 8  # of the rows of a batch


@dataclass
class Data:
    """Both splits as token streams, each file after an <|endoftext|>, and the held-out text itself."""

    tokenizer: Tokenizer
    train: np.ndarray  # int32
    held_out: np.ndarray  # int32
    held_out_files: list[bytes]


def load_data(folder: Path, where: Path, max_files: int | None = None) -> Data:
    """The files of `folder`/corpus.json found at `where`, a directory or a tar; prints those that differ."""
    listing = corpus.read_list(folder / "corpus.json")
    files, wrong = corpus.load(listing, where)
    if wrong:
        print(f"{len(wrong)} of {len(listing['files'])} listed files are absent or differ: {', '.join(wrong[:5])} ...")
    train, held_out = (corpus.split(listing, files, name)[:max_files] for name in ("train", "heldout"))
    if not train or not held_out:
        raise SystemExit(f"{where}: too few of the corpus' files are here. Pass --corpus with {listing['source']}.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    order = np.random.default_rng(0).permutation(len(train))

    def stream(texts: list[bytes]) -> np.ndarray:
        encoded = tokenizer.encode_batch([t.decode() for t in texts])
        return np.concatenate([np.array([0, *e.ids], dtype=np.int32) for e in encoded])

    return Data(tokenizer, stream([train[i] for i in order]), stream(held_out), held_out)


class Batches:
    """Random windows of the training stream and, below them, rows of the recall task."""

    def __init__(self, data: Data, batch: int, length: int, device: str, pool: int) -> None:
        self.batch, self.length, self.device = batch, length, device
        self.recall_rows = max(1, round(batch * RECALL_SHARE))
        self.stream = torch.from_numpy(data.train).to(device)
        rows = RecallTask(data.tokenizer).rows(data.train, pool, length + 1, seed=1)
        self.pool_tokens = torch.from_numpy(np.stack([r.tokens for r in rows])).to(device)
        self.pool_weights = torch.from_numpy(np.stack([r.weights for r in rows])).to(device)
        self.generator = torch.Generator(device).manual_seed(2)
        self.offsets = torch.arange(length + 1, device=device)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """inputs, targets [batch, length] int64 and the targets' weights in the loss [batch, length] fp32."""
        code_rows = self.batch - self.recall_rows
        starts = self._random(len(self.stream) - self.length, code_rows)
        picked = self._random(len(self.pool_tokens), self.recall_rows)
        tokens = torch.cat((self.stream[starts[:, None] + self.offsets], self.pool_tokens[picked])).long()
        weights = torch.ones(tokens.shape, device=self.device)
        weights[code_rows:] = self.pool_weights[picked].float()
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights[:, 1:].contiguous()

    def _random(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)


def held_out_probe(data: Data, rows: int, length: int) -> tuple[Tensor, int]:
    """`rows` windows [rows, length + 1] evenly spread over the held-out stream, and the bytes of their targets."""
    starts = np.linspace(0, max(0, len(data.held_out) - length - 1), rows).astype(int)
    tokens = np.stack([data.held_out[s : s + length + 1] for s in starts])
    texts = data.tokenizer.decode_batch(tokens[:, 1:].tolist(), skip_special_tokens=False)
    return torch.from_numpy(tokens).long(), sum(len(t.encode()) for t in texts)
