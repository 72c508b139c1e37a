"""The figures of jet-tiny's eval.json: bits per byte beside xz, gzip and a unigram; recall by distance; a continuation.

Bits per byte = sum of -log2 p(token) over every token of the held-out files / their bytes. Each file is preceded by
<|endoftext|> and read in windows of `WINDOW` tokens, half a window apart; a token is scored once, in the window that
gives it the most context. xz and gzip compress the same files as one stream, to their advantage.
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from jet_tiny.model import JetTiny
from jet_tiny.recall import ANSWER_TOKENS, RecallRow

WINDOW = 2048
BINS = (0, 64, 128, 256, 512, 1024, 2048)
RESET = 128  # tokens between resets, in the ablations of carried states


def windows(ids: list[int], size: int = WINDOW) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets), targets -100 where an earlier window scored them. ids[0] is context only."""
    for start in range(0, max(1, len(ids) - 1), size // 2):
        inputs, targets = ids[start : start + size], ids[start + 1 : start + size + 1]
        scored_before = min(len(targets), size // 2 if start else 0)
        if scored_before < len(targets):
            yield inputs[: len(targets)], [-100] * scored_before + targets[scored_before:]


@torch.no_grad()
def total_bits(model: JetTiny, documents: list[list[int]], device: str, batch: int = 16) -> float:
    """Sum of -log2 p over all tokens of the documents but each one's first."""
    pairs = sorted((w for ids in documents for w in windows(ids)), key=lambda w: len(w[0]))
    bits = 0.0
    for i in range(0, len(pairs), batch):
        group = pairs[i : i + batch]
        length = max(len(inputs) for inputs, _ in group)
        inputs = torch.tensor([a + [0] * (length - len(a)) for a, _ in group], device=device)
        targets = torch.tensor([b + [-100] * (length - len(b)) for _, b in group], device=device)
        loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten(), reduction="none")
        bits += loss.double().sum().item() / math.log(2)
    return bits


def bits_per_byte(model: JetTiny, tokenizer: Tokenizer, files: list[bytes], device: str) -> float:
    documents = [[0, *encoded.ids] for encoded in tokenizer.encode_batch([f.decode() for f in files])]
    return total_bits(model, documents, device) / sum(map(len, files))


def compressors(data: bytes) -> dict[str, float]:
    """Bits per byte of xz -9 and gzip -9."""
    size = len(data)
    return {"xz -9": 8 * len(lzma.compress(data, preset=9)) / size, "gzip -9": 8 * len(gzip.compress(data, 9)) / size}


def unigram_bits_per_byte(train: np.ndarray, documents: list[list[int]], size: int, vocab: int) -> float:
    """Token frequencies of the training split (add one), on the held-out tokens; `size` their bytes."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(sum(bits[ids].sum() for ids in documents) / size)


@torch.no_grad()
def recall(model: JetTiny, rows: list[RecallRow], device: str, batch: int = 16) -> dict[str, dict[str, float]]:
    """By distance: the share of answers with all digits right, the share of digits right, and the number of answers."""
    exact: list[list[float]] = [[] for _ in BINS]
    digits: list[list[float]] = [[] for _ in BINS]
    for i in range(0, len(rows), batch):
        group = rows[i : i + batch]
        tokens = torch.from_numpy(np.stack([row.tokens for row in group])).long().to(device)
        right = (model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).cpu().numpy()  # right[:, t]: token t+1 predicted
        for row, hits in zip(group, right, strict=True):
            for position, distance in row.answers:
                answer = hits[position - 1 : position - 1 + ANSWER_TOKENS]
                index = int(np.searchsorted(BINS, distance, side="left")) - 1
                exact[index].append(float(answer.all()))
                digits[index].append(float(answer.mean()))
    return {
        f"{low + 1}-{high}": {
            "exact": round(float(np.mean(exact[i])), 4),
            "digits": round(float(np.mean(digits[i])), 4),
            "answers": len(exact[i]),
        }
        for i, (low, high) in enumerate(itertools.pairwise(BINS))
        if exact[i]
    }


@contextmanager
def forgetting(model: JetTiny, kind: str, layer_types: tuple[str, ...]) -> Iterator[None]:
    """Layers of one kind restart every RESET tokens: no carried state, window or cache reaches further back."""

    def reset(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            pad = -x.shape[1] % RESET
            pieces = F.pad(x, (0, 0, 0, pad)).reshape(-1, RESET, x.shape[2])
            return forward(pieces).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]

        return run

    mixers = [m for m, t in zip(model.mixers(), layer_types, strict=True) if t == kind]
    for mixer in mixers:
        mixer.forward = reset(mixer.forward)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward


@torch.no_grad()
def greedy(model: JetTiny, tokenizer: Tokenizer, prompt: str, new_tokens: int, device: str) -> str:
    """The prompt and its greedy continuation, by running the whole sequence again for each token."""
    ids = tokenizer.encode(prompt).ids
    for _ in range(new_tokens):
        logits = model(torch.tensor([ids], device=device))[0, -1]
        token = int(logits.argmax())
        if token == 0:
            break
        ids.append(token)
    return tokenizer.decode(ids)
