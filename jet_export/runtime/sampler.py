"""Sampling settings of every slot, and the draw of a step's tokens: by kernels/sampling.py, in NumPy on a CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jet_export.kernels.sampling_ref import (
    BIAS,
    FLOATS,
    INTS,
    MASK,
    MAX_BLOCKED,
    PENALTIES,
    RowSettings,
    SamplerState,
    sample_ref,
)
from jet_export.runtime.transfer import to_device


class SlotSampler:
    """One a BatchingEngine. `begin` gives a slot to a request; `sample` draws for a step's rows, whatever their mix."""

    def __init__(
        self,
        slots: int,
        vocab: int,
        device: torch.device,
        kernels: bool | None = None,
        last_tokens: Tensor | None = None,
    ) -> None:
        """`kernels`: launch them; by default on a GPU. `last_tokens` [slots] int64 is given every sampled token too."""
        self.kernels = device.type == "cuda" if kernels is None else kernels
        self.slots, self.vocab, self.device = slots, vocab, device
        self.last_tokens = torch.zeros(slots, dtype=torch.int64, device=device) if last_tokens is None else last_tokens
        self.state = SamplerState(
            floats=torch.zeros(slots, len(FLOATS), device=device),
            ints=torch.zeros(slots, len(INTS), dtype=torch.int64, device=device),
            blocked=torch.full((slots, MAX_BLOCKED), -1, dtype=torch.int32, device=device),
            counts=torch.zeros(1, 1, dtype=torch.int32, device=device),
            seen=torch.zeros(1, 1, dtype=torch.int8, device=device),
            bias=torch.zeros(1, 1, device=device),
            last_tokens=self.last_tokens,
        )
        self.penalised: set[int] = set()  # slots whose counts the kernels read
        self.on_host: dict[int, tuple[RowSettings, list[int], list[int]]] = {}  # on a CPU: settings, prompt, output

    def warm_up(self, dtype: torch.dtype, ahead: bool = False) -> None:
        """Compile the kernels for logits of this dtype, so that no request waits for it; `ahead`: `look_ahead` too.
        Leaves slot 0 to be begun."""
        if self.kernels:
            logits = torch.zeros(1, self.vocab, dtype=dtype, device=self.device)
            self.sample(logits, torch.zeros(1, dtype=torch.int32, device=self.device))
            if ahead:
                self.look_ahead(logits, [0], [0])

    def begin(self, slot: int, row: RowSettings, prompt: list[int], made: list[int], masked: bool = False) -> None:
        """A request takes the slot, having made some tokens already. `masked`: its steps bring a token mask."""
        if len(row.blocked) > MAX_BLOCKED:
            raise ValueError(f"{len(row.blocked)} blocked tokens; at most {MAX_BLOCKED}")
        if not self.kernels:
            self.on_host[slot] = (row, prompt, list(made))
            return
        flags = (PENALTIES if row.penalised else 0) | (BIAS if row.logit_bias else 0) | (MASK if masked else 0)
        seed = (row.seed + 2**63) % 2**64 - 2**63  # the same 64 bits, signed
        ints = [seed, len(made), row.choice, row.top_k, row.min_tokens if row.blocked else 0, flags]
        self.state.floats[slot] = self._upload([getattr(row, name) for name in FLOATS], torch.float32)
        self.state.ints[slot] = self._upload(ints, torch.int64)
        if row.blocked:
            padded = [*row.blocked, *[-1] * (MAX_BLOCKED - len(row.blocked))]
            self.state.blocked[slot] = self._upload(padded, torch.int32)
        self.penalised.discard(slot)
        if row.penalised:
            self.penalised.add(slot)
            self._begin_counts(slot, prompt, made)
        if row.logit_bias:
            self._begin_bias(slot, row.logit_bias)

    def _upload(self, values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self.device)

    def _begin_counts(self, slot: int, prompt: list[int], made: list[int]) -> None:
        if self.state.counts.numel() == 1:
            shape = self.slots, self.vocab
            self.state = self.state._replace(
                counts=torch.zeros(shape, dtype=torch.int32, device=self.device),
                seen=torch.zeros(shape, dtype=torch.int8, device=self.device),
            )
        self.state.counts[slot].zero_()
        self.state.seen[slot].zero_()
        if prompt:
            self.state.seen[slot].index_fill_(0, self._upload(sorted(set(prompt)), torch.int64), 1)
        if made:
            ones = torch.ones(len(made), dtype=torch.int32, device=self.device)
            self.state.counts[slot].index_add_(0, self._upload(made, torch.int64), ones)

    def _begin_bias(self, slot: int, bias: tuple[tuple[int, float], ...]) -> None:
        if self.state.bias.numel() == 1:
            self.state = self.state._replace(bias=torch.zeros(self.slots, self.vocab, device=self.device))
        self.state.bias[slot].zero_()
        tokens, values = zip(*bias, strict=True)
        index = self._upload(list(tokens), torch.int64)
        self.state.bias[slot].index_add_(0, index, self._upload(list(values), torch.float32))

    def sample(
        self,
        logits: Tensor,  # [N, V], rows contiguous
        slots: Tensor,  # [N] int32, each at most once
        allowed: Tensor | None = None,  # [N, cdiv(V, 32)] int32: bit v of a row is set where token v may come
    ) -> tuple[Tensor, Tensor]:
        """(tokens [N] int64, -1 where a row has none; ln of the sum of exp of the logits [N] fp32).

        Each slot moves on by one token. On a GPU nothing synchronises.
        """
        if not self.kernels:
            return self._sample_on_host(logits, slots, allowed)
        from jet_export.kernels.sampling import sample_triton  # imports Triton, which a CPU does without

        return sample_triton(self.state, logits, slots, allowed)

    def look_ahead(
        self,
        logits: Tensor,  # [M, V], rows contiguous
        slots: list[int],  # [M]
        ahead: list[int],  # [M]: how many tokens behind the next one
        fed: list[int] | None = None,  # [M]: the token that a row follows
        allowed: Tensor | None = None,  # [M, cdiv(V, 32)] int32, as in `sample`
    ) -> tuple[Tensor, Tensor]:
        """As `sample`, for positions further on. No slot moves: `advance` does that. With `fed` the rows of a slot
        follow each other, from its next position on, and the tokens in between count for penalties."""
        if self.kernels:
            from jet_export.kernels.sampling import sample_triton

            integers = [slots, ahead, fed or [-1] * len(slots)]
            rows, behind, between = to_device(torch.tensor(integers, dtype=torch.int32), self.device)
            return sample_triton(self.state, logits, rows, allowed, behind, between)
        tokens = []
        for i, (slot, n) in enumerate(zip(slots, ahead, strict=True)):
            row, prompt, made = self.on_host[slot]
            if fed is None and row.penalised:  # tokens that are not known have no counts
                row = replace(row, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
            mask = None if allowed is None else unpacked(allowed[i], self.vocab)
            between_tokens = fed[i - n + 1 : i + 1] if fed else [0] * n
            tokens.append(sample_ref(logits[i].double().numpy(), row, prompt, [*made, *between_tokens], mask))
        return torch.tensor(tokens, dtype=torch.int64), logits.float().logsumexp(-1)

    def advance(self, made: dict[int, list[int]]) -> None:
        """The requests of these slots have these tokens, found by `look_ahead`; the last of each is decoded next."""
        if not made:
            return
        last = [tokens[-1] for tokens in made.values()]
        slots, counts, tokens = self._upload_rows([list(made), [len(t) for t in made.values()], last])
        self.last_tokens[slots] = tokens
        if self.kernels:
            self.state.ints[slots, 1] += counts
            counted = [(slot, t) for slot in self.penalised.intersection(made) for t in made[slot]]
            if counted:
                at, new = self._upload_rows([list(x) for x in zip(*counted, strict=True)])
                self.state.counts.index_put_((at, new), torch.ones_like(at, dtype=torch.int32), accumulate=True)
        else:
            for slot, more in made.items():
                self.on_host[slot][2].extend(more)

    def _upload_rows(self, rows: list[list[int]]) -> tuple[Tensor, ...]:
        return to_device(torch.tensor(rows, dtype=torch.int64), self.device).unbind()

    def _sample_on_host(self, logits: Tensor, slots: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens = []
        for i, slot in enumerate(slots.tolist()):
            row, prompt, made = self.on_host[slot]
            mask = None if allowed is None else unpacked(allowed[i], self.vocab)
            tokens.append(sample_ref(logits[i].double().numpy(), row, prompt, made, mask))
            made.append(tokens[-1])
        out = torch.tensor(tokens, dtype=torch.int64)
        self.last_tokens[slots.long()] = out.clamp_min(0)
        return out, logits.float().logsumexp(-1)


def unpacked(words: Tensor, vocab: int) -> npt.NDArray[np.bool_]:
    """[cdiv(vocab, 32)] int32 -> [vocab] bool."""
    return np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[:vocab].astype(bool)
