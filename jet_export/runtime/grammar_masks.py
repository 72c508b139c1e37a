"""Where answers are in their grammars, and the masks of the tokens that may come next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from jet_export.runtime.grammar_compile import CompiledGrammar

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

MAX_THREADS = 8
Words = np.ndarray[tuple[int], np.dtype[np.int32]]


class Drawn(Protocol):
    """A sequence that tokens are drawn for."""

    @property
    def matcher(self) -> AnswerMatcher | None: ...


class AnswerMatcher:
    """One answer in its grammar; `ends` are the tokens that may end it, once the grammar accepts it.

    Only the thread that takes the steps calls it. `error` says why it cannot go on. `closed`: the grammar accepts the
    first so many tokens and no further one. `ahead`: how many tokens it will have accepted and which one last, where
    the masks of a draft have found that it will be closed then.
    """

    def __init__(self, compiled: CompiledGrammar, ends: Sequence[int]) -> None:
        self.tokenizer, self.matcher = compiled.tokenizer, compiled.matcher()
        self.ends = frozenset(i for i in ends if i in self.tokenizer.eos_tokens or self.tokenizer.is_special_token(i))
        self.never_or_last = self.ends.union(self.tokenizer.eos_tokens)
        self.known = compiled.known
        self.accepted = 0  # tokens
        self.error, self.closed = "", -1
        self.ahead = (-1, -1)

    def valid(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft may come, one after the other, before the answer ends."""
        if self.error or self.closed >= 0:
            return 0
        n = next((i for i, token in enumerate(draft) if token in self.never_or_last or token >= self.known), len(draft))
        return self.matcher.validate_tokens(list(draft[:n])) if n else 0

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
        if token < 0 or token in self.ends or self.error or self.closed >= 0:
            return
        if not self.matcher.consume_token(token):
            self.error = self.matcher.get_error() or "the token is not in the grammar"
        elif self.matcher.is_stopped() or self.ahead == (self.accepted, token):
            self.closed = self.accepted


def accept(sequences: Sequence[Drawn], tokens: Sequence[Sequence[int]]) -> None:
    """Tell the grammars of these sequences the tokens that were drawn for each."""
    for sequence, drawn in zip(sequences, tokens, strict=True):
        if (matcher := sequence.matcher) is not None:  # another thread may end the request meanwhile
            for token in drawn:
                matcher.accept(token)
                if token in matcher.ends:
                    break


class TokenMasks:
    """The masks of a step's rows, in memory that the device reads while the host goes on: filled again only after the
    tokens drawn with them have reached the host."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        """`rows`: of a step, at most."""
        self.rows, self.vocab, self.device = rows, vocab, device
        self._host: Tensor | None = None  # [rows, words] int32
        self._target: Tensor | None = None
        self._executor: LLExecutor | None = None

    def fill(self, matchers: Sequence[AnswerMatcher | None], drafts: Sequence[Sequence[int]] | None = None) -> Tensor:
        """[N, cdiv(vocab, 32)] int32 or a little wider, as SlotSampler.sample takes it; a row without a matcher allows
        every token, and so does one whose matcher fails, which has an `error` then.

        With `drafts`, of each matcher, N is of one row a matcher and one a drafted token: the mask behind it. Behind a
        token that may not come, every one is allowed, as that row's draw does not count."""
        lengths = [1 + len(d) for d in drafts] if drafts is not None else [1] * len(matchers)
        firsts, n = list(accumulate(lengths, initial=0))[:-1], sum(lengths)
        ours = [(i, m) for i, m in zip(firsts, matchers, strict=True) if m is not None and not m.error]
        host, target = self._buffers(ours[0][1].tokenizer.vocab_size if ours else self.vocab)
        words = host.numpy()
        if len(ours) < n:
            words[:n] = -1
        self._compute(host, [(m.matcher, i) for i, m in ours])
        for i, m in ours:
            m.ahead = (-1, -1)  # another draft's
            self._finish(words[i], m)
        if drafts is not None:
            own = dict(zip(firsts, drafts, strict=True))
            self._fill_ahead(host, [(i, m, own[i]) for i, m in ours])
        return target[:n].copy_(host[:n], non_blocking=True) if target is not host else host[:n]

    def _fill_ahead(self, host: Tensor, rows: list[tuple[int, AnswerMatcher, Sequence[int]]]) -> None:
        """The masks behind drafted tokens, in the rows behind a matcher's own; copies of the matchers go on."""
        words, going = host.numpy(), []
        for i, m, draft in rows:
            if m.closed < 0 and not m.error:
                going.append((i, m, draft, m.matcher.deep_copy()))
        for n in range(max((len(draft) for *_, draft, _ in going), default=0)):
            going = [(i, m, d, copy) for i, m, d, copy in going if n < len(d) and _goes_on(m, copy, d[n])]
            self._compute(host, [(copy, i + n + 1) for i, _, _, copy in going])
            left = []
            for i, m, draft, copy in going:
                if copy.is_error():  # where it comes to that, the request fails there
                    words[i + n + 1] = -1
                elif _own_ends(words[i + n + 1], m, copy):
                    m.ahead = (m.accepted + n + 1, draft[n])
                else:
                    left.append((i, m, draft, copy))
            going = left

    def _compute(self, host: Tensor, rows: list[tuple[LLMatcher, int]]) -> None:
        if rows:
            assert self._executor is not None
            self._executor.unsafe_compute_mask_ptr(rows, host.data_ptr(), 4 * host.shape[1], len(host))

    def _finish(self, row: Words, m: AnswerMatcher) -> None:
        if m.matcher.is_error():
            m.error = m.matcher.get_error()
            row[:] = -1
        elif _own_ends(row, m, m.matcher):
            m.closed = m.accepted

    def _buffers(self, vocab: int) -> tuple[Tensor, Tensor]:
        words = -(-max(vocab, self.vocab) // 32)
        if self._host is None or self._target is None or self._host.shape[1] < words:
            from llguidance import LLExecutor

            cuda = self.device.type == "cuda"
            self._host = torch.empty(self.rows, words, dtype=torch.int32, pin_memory=cuda)
            self._target = torch.empty(self._host.shape, dtype=torch.int32, device=self.device) if cuda else self._host
            self._executor = LLExecutor(max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2)))
        return self._host, self._target


_BITS = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)


def _goes_on(m: AnswerMatcher, copy: LLMatcher, token: int) -> bool:
    """Whether the answer goes on behind a drafted token, which `copy` then has accepted."""
    if token in m.never_or_last or token >= m.known:
        return False
    return copy.consume_token(token) and not copy.is_stopped()


def _own_ends(row: Words, m: AnswerMatcher, at: LLMatcher) -> bool:
    """The bits of the tokens that end an answer are ours. Whether the grammar has come to its end."""
    word = m.known >> 5
    row[word : word + 1] &= (1 << (m.known & 31)) - 1
    row[word + 1 :] = 0
    for token in m.never_or_last:
        row[token >> 5] &= ~_BITS[token & 31]
    if not at.is_accepting():
        return False
    closed = not row.any()
    for token in m.ends:
        row[token >> 5] |= _BITS[token & 31]
    return closed
