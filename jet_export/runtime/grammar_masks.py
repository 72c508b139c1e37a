"""Where answers are in their grammars, and the masks of the tokens that may come next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from jet_export.runtime.grammar_compile import CompiledGrammar

if TYPE_CHECKING:
    from llguidance import LLExecutor

MAX_THREADS = 8


class Drawn(Protocol):
    """A sequence that tokens are drawn for."""

    @property
    def matcher(self) -> AnswerMatcher | None: ...


class AnswerMatcher:
    """One answer in its grammar; `ends` are the tokens that may end it, once the grammar accepts it.

    Only the thread that takes the steps calls it. `error` says why it cannot go on. `closed`: the grammar accepts the
    first so many tokens and no further one.
    """

    def __init__(self, compiled: CompiledGrammar, ends: Sequence[int]) -> None:
        self.tokenizer, self.matcher = compiled.tokenizer, compiled.matcher()
        self.ends = frozenset(i for i in ends if i in self.tokenizer.eos_tokens or self.tokenizer.is_special_token(i))
        self.never_or_last = self.ends.union(self.tokenizer.eos_tokens)
        self.known = compiled.known
        self.accepted = 0  # tokens
        self.error, self.closed = "", -1

    def rewind(self, made: Sequence[int]) -> None:
        """The answer consists of these tokens: those it has made, or fewer where it makes them again."""
        if self.accepted != len(made):
            self.matcher.reset()
            self.accepted, self.closed = 0, -1
            for token in made:
                self.accept(token)

    def accept(self, token: int) -> None:
        """The token that was drawn next; -1 is none."""
        self.accepted += 1
        if token < 0 or token in self.ends or self.error:
            return
        if not self.matcher.consume_token(token):
            self.error = self.matcher.get_error() or "the token is not in the grammar"
        elif self.matcher.is_stopped():
            self.closed = self.accepted


def accept(sequences: Sequence[Drawn], tokens: Sequence[int]) -> None:
    """Tell the grammars of these sequences the tokens that were drawn for them."""
    for sequence, token in zip(sequences, tokens, strict=True):
        if (matcher := sequence.matcher) is not None:  # another thread may end the request meanwhile
            matcher.accept(token)


class TokenMasks:
    """The masks of a step's rows, in memory that the device reads while the host goes on: filled again only after the
    tokens drawn with them have reached the host."""

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self.slots, self.vocab, self.device = slots, vocab, device
        self._host: Tensor | None = None  # [slots, words] int32
        self._target: Tensor | None = None
        self._executor: LLExecutor | None = None

    def fill(self, matchers: Sequence[AnswerMatcher | None]) -> Tensor:
        """[N, cdiv(vocab, 32)] int32 or a little wider, as SlotSampler.sample takes it; a row without a matcher allows
        every token, and so does one whose matcher fails, which has an `error` then."""
        rows = [(i, m) for i, m in enumerate(matchers) if m is not None and not m.error]
        host, target = self._buffers(rows[0][1].tokenizer.vocab_size if rows else self.vocab)
        words = host.numpy()
        if len(rows) < len(matchers):
            for i in set(range(len(matchers))) - {i for i, _ in rows}:
                words[i] = -1
        if rows:
            assert self._executor is not None
            self._executor.unsafe_compute_mask_ptr(
                [(m.matcher, i) for i, m in rows], host.data_ptr(), 4 * host.shape[1], self.slots
            )
        for i, m in rows:
            self._finish(words[i], m)
        n = len(matchers)
        return target[:n].copy_(host[:n], non_blocking=True) if target is not host else host[:n]

    def _finish(self, row: np.ndarray[tuple[int], np.dtype[np.int32]], m: AnswerMatcher) -> None:
        """The bits of the tokens that end an answer are ours."""
        if m.matcher.is_error():
            m.error = m.matcher.get_error()
            row[:] = -1
            return
        at = m.known >> 5
        row[at : at + 1] &= (1 << (m.known & 31)) - 1
        row[at + 1 :] = 0
        for token in m.never_or_last:
            row[token >> 5] &= ~_BITS[token & 31]
        if m.matcher.is_accepting():
            if not row.any():
                m.closed = m.accepted
            for token in m.ends:
                row[token >> 5] |= _BITS[token & 31]

    def _buffers(self, vocab: int) -> tuple[Tensor, Tensor]:
        words = -(-max(vocab, self.vocab) // 32)
        if self._host is None or self._target is None or self._host.shape[1] < words:
            from llguidance import LLExecutor

            cuda = self.device.type == "cuda"
            self._host = torch.empty(self.slots, words, dtype=torch.int32, pin_memory=cuda)
            self._target = torch.empty(self._host.shape, dtype=torch.int32, device=self.device) if cuda else self._host
            self._executor = LLExecutor(max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2)))
        return self._host, self._target


_BITS = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)
