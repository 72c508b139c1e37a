"""Sampling: its settings, and the specification of sampling.py in NumPy, float64, which is also what runs on a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GREEDY_BELOW = 1e-5  # temperatures
PENALTIES, BIAS, MASK = 1, 2, 4  # bits of `flags`
MAX_BLOCKED = 24  # tokens that min_tokens keeps away: end-of-sequence and stop tokens
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTS = ("seed", "position", "choice", "top_k", "min_tokens", "flags")


class SamplerState(NamedTuple):
    """The settings of S slots, and what their requests have made. counts, seen and bias are [1, 1] until used."""

    floats: Tensor  # [S, 6] fp32: FLOATS
    ints: Tensor  # [S, 6] int64: INTS
    blocked: Tensor  # [S, MAX_BLOCKED] int32, -1: none
    counts: Tensor  # [S, V] int32: how often each token is in the output
    seen: Tensor  # [S, V] int8: whether it is in the prompt
    bias: Tensor  # [S, V] fp32
    last_tokens: Tensor  # [S] int64: the token that was sampled last, 0 for -1


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What one request asks of the sampler. See the module's equations; the defaults change nothing."""

    temperature: float = 0.0
    top_k: int = 0  # 0: every token
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    min_tokens: int = 0  # before so many are made, `blocked` are not
    blocked: tuple[int, ...] = ()
    seed: int = 0  # 64 bits
    choice: int = 0  # of several answers to one request

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def philox_ref(seed: int, position: int, choice: int, vocab: int) -> np.ndarray:
    """[vocab] uint32: word v mod 4 of Philox-4x32-10, key `seed`, counter (v div 4, position, choice, 0)."""
    n = -(-vocab // 4)
    c = [np.arange(n, dtype=np.uint64), *(np.full(n, x & 0xFFFFFFFF, dtype=np.uint64) for x in (position, choice, 0))]
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> shift) ^ c[1] ^ k0, b & low, (a >> shift) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=1).reshape(-1)[:vocab].astype(np.uint32)


def gumbel_ref(seed: int, position: int, choice: int, vocab: int) -> np.ndarray:
    """[vocab] float64: g = -ln(-ln u), u = 1 - (word + 1/2) / 2^32."""
    w = (philox_ref(seed, position, choice, vocab).astype(np.float64) + 0.5) / 2.0**32
    return -np.log(-np.log1p(-w))


def processed_ref(
    logits: np.ndarray,  # [V] float64
    row: RowSettings,
    prompt: list[int],
    made: list[int],
    allowed: np.ndarray | None,  # [V] bool
) -> np.ndarray:
    """x' of the module, float64."""
    x = logits.copy()
    if row.penalised:
        seen = np.zeros(len(x), dtype=bool)
        seen[[*prompt, *made]] = True
        counts = np.bincount(np.asarray(made, dtype=np.int64), minlength=len(x))
        r = row.repetition_penalty
        x = np.where(seen, np.where(x > 0, x / r, x * r), x)
        x = x - row.presence_penalty * (counts > 0) - row.frequency_penalty * counts
    for token, bias in row.logit_bias:
        x[token] += bias
    if len(made) < row.min_tokens:
        x[list(row.blocked)] = -np.inf
    return x if allowed is None else np.where(allowed, x, -np.inf)


def support_ref(y: np.ndarray, row: RowSettings) -> np.ndarray:
    """[V] bool: S of the module, from y [V] float64."""
    keep = y > -np.inf
    if 0 < row.top_k < len(y):
        keep &= y >= np.sort(y)[-row.top_k]
    if row.min_p > 0:
        keep &= y >= y.max() + math.log(row.min_p)
    if row.top_p < 1:
        mass = np.where(keep, np.exp(y - y.max()), 0.0)
        order = np.argsort(-y, kind="stable")
        before = np.concatenate([[0.0], np.cumsum(mass[order])[:-1]])
        first_of_tie = np.concatenate([[True], y[order][1:] != y[order][:-1]])
        above = np.empty_like(y)  # the mass of strictly more likely tokens
        above[order] = before[np.maximum.accumulate(np.where(first_of_tie, np.arange(len(y)), 0))]
        keep &= above < row.top_p * mass.sum()
    return keep


def sample_ref(
    logits: np.ndarray,  # [V] float64
    row: RowSettings,
    prompt: list[int],
    made: list[int],
    allowed: np.ndarray | None = None,  # [V] bool
) -> int:
    """The next token, in float64; -1 where the row has none."""
    x = processed_ref(logits, row, prompt, made, allowed)
    if np.isnan(logits).any() or not np.isfinite(x.max()):
        return -1
    if row.temperature < GREEDY_BELOW:
        return int(x.argmax())
    y = x / row.temperature
    drawn = y + gumbel_ref(row.seed, len(made), row.choice, len(y))
    return int(np.where(support_ref(y, row), drawn, -np.inf).argmax())
