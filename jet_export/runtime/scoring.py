"""Log probabilities of prompt tokens. The prompt chunks of a step that are scored run in calls of their own, so many
tokens in each that their logits, in the engine's dtype, stay within a bound; a kernel reads them once, and only the
numbers that were asked for reach the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.runtime.logprobs import launch_prompt_logprobs
from jet_export.runtime.params import Logprob
from jet_export.runtime.runner import Runner
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.transfer import to_device

LOGITS_BYTES = 640 << 20  # of a call on a CPU, at most
SHARE = 56  # on a GPU 1/56 of its memory: of 141 GB 8,200 tokens of a vocabulary of 152 K in 16 bits, which take the
# GPU several times as long as the host needs to launch a call
BLOCK = 64  # tokens that the kernels take at once: calls have whole blocks of a sequence


@dataclass(frozen=True, kw_only=True)
class ScoredChunk:
    """A chunk of a prompt: its tokens from number `first` on. `ends`: the first token of the answer comes of it."""

    sequence: RunningSequence
    slot: int
    first: int
    tokens: list[int]
    ends: bool

    def targets(self, at: int, n: int) -> list[int]:
        """The tokens behind n of its tokens; 0 behind the prompt's last."""
        found = self.sequence.prompt[self.first + at + 1 : self.first + at + 1 + n]
        return [*found, *[0] * (n - len(found))]


@dataclass(frozen=True)
class Score:
    """The log probabilities of a call, while the device computes them."""

    rows: list[tuple[ScoredChunk, int, int]]  # chunk, which of its tokens comes first, how many of them
    wait: Callable[[], list[Logprob]]  # of all rows

    def deliver(self) -> None:
        """Wait for them, and give them to the sequences."""
        found, done = self.wait(), 0
        for chunk, at, n in self.rows:
            first = chunk.first + at + 1
            known = max(0, min(n, len(chunk.sequence.prompt) - first))
            chunk.sequence.add_prompt_logprobs(first, found[done : done + known])
            done += n


def score_chunks(chunks: Sequence[ScoredChunk], runner: Runner) -> tuple[list[Tensor], list[Score]]:
    """Launch them. (Logits [1, vocab] behind each chunk that `ends`, in order; the log probabilities.)"""
    ended: dict[int, Tensor] = {}
    scores = []
    for call in calls([len(c.tokens) for c in chunks], call_tokens(runner), alone=runner.deterministic):
        logits = runner.prefill(
            [chunks[i].slot for i, _, _ in call],
            [chunks[i].tokens[at : at + n] for i, at, n in call],
            all_logits=True,
        )
        targets = torch.tensor([t for i, at, n in call for t in chunks[i].targets(at, n)], dtype=torch.int64)
        top = [chunks[i].sequence.params.prompt_logprobs or 0 for i, _, n in call for _ in range(n)]
        wait = launch_prompt_logprobs(logits, to_device(targets, runner.device), top)
        scores.append(Score([(chunks[i], at, n) for i, at, n in call], wait))
        last = 0
        for i, at, n in call:
            last += n
            if at + n == len(chunks[i].tokens):
                ended[i] = logits[last - 1 : last].clone()
    return [ended[i] for i, c in enumerate(chunks) if c.ends], scores


def call_tokens(runner: Runner) -> int:
    """Tokens of a call, at most: whole blocks where there is room for one."""
    engine, room = runner.engine, LOGITS_BYTES
    if engine.device.type == "cuda":
        room = int(torch.cuda.get_device_properties(engine.device).total_memory) // SHARE
    tokens = max(1, min(room // (engine.config.vocab_size * engine.dtype.itemsize), engine.limits.max_prefill_tokens))
    return tokens // BLOCK * BLOCK or tokens


def calls(lengths: Sequence[int], most: int, *, alone: bool = False) -> Iterator[list[tuple[int, int, int]]]:
    """Calls of up to `most` tokens: (which chunk, which of its tokens comes first, how many of them) each.

    All chunks advance together, by as many blocks as there is room for: a recurrence runs block after block, so a call
    of few blocks of many sequences is sooner done than one of many blocks of few. `alone`: a chunk a call, whose bits
    then do not depend on the others.
    """
    if alone and len(lengths) > 1:
        for i, length in enumerate(lengths):
            yield from ([(i, at, n) for _, at, n in call] for call in calls([length], most))
        return
    at = [0] * len(lengths)
    live = [i for i, n in enumerate(lengths) if n]
    while live:
        width = min(most, max(BLOCK, most // len(live) // BLOCK * BLOCK))
        call, room = [], most
        for i in live:
            n = min(width, lengths[i] - at[i])
            if n > room:
                break
            call.append((i, at[i], n))
            at[i] += n
            room -= n
        yield call
        live = [i for i in live if at[i] < lengths[i]]
