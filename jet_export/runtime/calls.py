"""The integers of an engine's call, packed so that one copy takes them to the device, and the sizes of captured calls.

A token is written as its id, or as -1 - slot: the token that the slot sampled last, which may be on the device only.
Captured calls have few sizes: what a call does not use belongs to padding sequences, each of which has a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from jet_export.bundle.limits import Limits

ALONE = 8  # prompts in a call of a whole step's tokens: nothing decodes beside them yet
ALIGNED = 4  # int32s of 16 bytes: the kernels load whole vectors
MAX_TOKENS = 2048  # of a captured call: longer ones take the GPU longer than the host needs to launch them


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


@dataclass(frozen=True, kw_only=True)
class CallSize:
    """What a call has room for."""

    tokens: int
    sequences: int  # padding included
    outputs: int  # rows of logits

    @property
    def parts(self) -> tuple[int, ...]:
        """token ids, cu_seqlens, slots, context_lens, rows of logits."""
        return self.tokens, self.sequences + 1, self.sequences, self.sequences, self.outputs

    @property
    def integers(self) -> int:
        return sum(round_up(n, ALIGNED) for n in self.parts)

    def split(self, packed: Tensor) -> list[Tensor]:
        parts = torch.split(packed, [round_up(n, ALIGNED) for n in self.parts])
        return [part[:n] for part, n in zip(parts, self.parts, strict=True)]


def captured_size(tokens: int, sequences: int, limits: Limits) -> CallSize | None:
    """The size of the captured call that serves so many tokens and sequences; None if it is too long for one."""
    outputs = min(max(8, decode_bucket(sequences)), max(limits.max_batch_size, sequences))
    padded = outputs + 1  # the last one takes the tokens that are left over
    least = tokens + padded - sequences
    room = round_up(least, 32 if least <= 256 else 64)
    if room > min(MAX_TOKENS, limits.max_prefill_tokens):
        return None
    return CallSize(tokens=room, sequences=padded, outputs=outputs)


def decode_bucket(sequences: int) -> int:
    """Rows of the captured decode step that serves so many sequences: 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, ..."""
    power = 1 << (sequences - 1).bit_length()
    middle = 3 * power // 4
    return middle if power > 8 and sequences <= middle else power


def service_sizes(slots: int, token_budget: int, prompt_tokens: Callable[[int], int], limits: Limits) -> list[CallSize]:
    """The sizes of the captured calls that serving needs, the largest first.

    `token_budget`: tokens of a step; `prompt_tokens`: those of prompts, where so many sequences decode beside them.
    """
    sizes: set[CallSize | None] = set()
    for sequences in range(1, slots + 1):
        longest = token_budget if sequences <= ALONE else min(token_budget, sequences + prompt_tokens(sequences))
        for tokens in range(sequences, longest + 1, 8):
            sizes.add(captured_size(tokens, sequences, limits))
        sizes.add(captured_size(longest, sequences, limits))
    return sorted((s for s in sizes if s is not None), key=lambda size: (-size.tokens, -size.sequences))


def pack(
    slots: Sequence[int],
    tokens: Sequence[Sequence[int] | None],  # of each sequence; None: the token that its slot sampled last
    held: Sequence[int],  # tokens held by each sequence
    size: CallSize | None = None,  # None: no padding
) -> tuple[Tensor, CallSize]:
    """The call's integers [size.integers] int32, on the host; logits are those of every sequence's last token."""
    fed = [(-1 - slot,) if t is None else t for slot, t in zip(slots, tokens, strict=True)]
    lens = [len(t) for t in fed]
    size = size or CallSize(tokens=sum(lens), sequences=len(lens), outputs=len(lens))
    rest, padding = size.tokens - sum(lens), size.sequences - len(lens)
    if padding:
        lens += [1] * (padding - 1) + [rest - padding + 1]
    ends = list(accumulate(lens, initial=0))
    zeros, last = [0] * padding, [end - 1 for end in ends[1 : len(fed) + 1]]
    parts = (
        chain(chain.from_iterable(fed), [0] * rest),
        ends,
        [*slots, *[-1] * padding],
        [*held, *zeros],
        [*last, *[0] * (size.outputs - len(last))],
    )
    packed = array("i")
    for part in parts:
        packed.extend(part)
        packed.extend([0] * (-len(packed) % ALIGNED))
    return torch.frombuffer(packed, dtype=torch.int32), size
