"""Log probabilities of prompt tokens. The logits of a chunk are made and read on the device, piece by piece, in calls
of their own beside those of the other requests; only the numbers that were asked for reach the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jet_export.runtime.logprobs import launch_logprobs
from jet_export.runtime.params import Logprob
from jet_export.runtime.runner import Runner
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.transfer import to_device

PIECE = 512  # tokens of a call, whose logits are [PIECE, vocab]
ROWS = 64  # of the logits, in fp32 at once


@dataclass(frozen=True, kw_only=True)
class ScoredChunk:
    """A chunk of a prompt: its tokens from number `first` on. `ends`: the first token of the answer comes of it."""

    sequence: RunningSequence
    slot: int
    first: int
    tokens: list[int]
    ends: bool

    def run(self, runner: Runner) -> tuple[Tensor, Score]:
        """Launch it. (Logits [1, vocab] behind its last token, the log probabilities of the tokens behind each.)"""
        top = self.sequence.params.prompt_logprobs or 0
        following = self.sequence.prompt[self.first + 1 : self.first + 1 + len(self.tokens)]
        targets = to_device(torch.tensor(following, dtype=torch.int64), runner.device)
        waits: list[Callable[[], dict[int, Logprob]]] = []
        for at in range(0, len(self.tokens), PIECE):
            logits = runner.prefill([self.slot], [self.tokens[at : at + PIECE]], all_logits=True)
            for row in range(0, min(len(logits), len(targets) - at), ROWS):
                chosen = targets[at + row : at + min(row + ROWS, len(logits))]
                part = logits[row : row + len(chosen)]
                asked = dict.fromkeys(range(len(part)), top)
                waits.append(launch_logprobs(part, chosen, part.float().logsumexp(-1), asked))
        return logits[-1:].clone(), Score(self, waits)


@dataclass(frozen=True)
class Score:
    """The log probabilities of a chunk, while the device computes them."""

    chunk: ScoredChunk
    waits: list[Callable[[], dict[int, Logprob]]]

    def deliver(self) -> None:
        """Wait for them, and give them to the sequence."""
        found = [logprob for wait in self.waits for logprob in wait().values()]
        self.chunk.sequence.add_prompt_logprobs(self.chunk.first + 1, found)
