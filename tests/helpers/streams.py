"""Sequences of tokens fed to jet_block call by call, with states written every few tokens and tokens taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import EXTRA, buffer_rows
from jet_export.kernels.step_buffer import current_state


class Call(NamedTuple):
    """One call: of each sequence the tokens that are its next ones, and behind them tokens that are taken back."""

    form: Form
    tokens: list[int]  # 0: the sequence is a padding row of one token
    rejected: list[int] | None = None


@dataclass
class Streams:
    """`run` feeds the calls of a plan. Tokens are the same in every run; those that are rejected are other numbers."""

    block: Callable[..., Tensor]
    N: int = 2
    H: int = 1
    K: int = 16
    V: int = 32
    W: int = 4
    positions: int = 32
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    inputs: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        r, H, D = torch.Generator().manual_seed(1), self.H, self.H * self.V

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=r)

        widths = 2 * H * self.K + 2 * D + 8, 2 * H, D * self.W  # qkuz, ba, kappa
        self.inputs = [rand(self.N, self.positions, w).to(self.dtype) for w in widths]
        self.weights = [torch.empty(H).uniform_(0.1, 8, generator=r).log(), rand(H) - 3, 0.1 * rand(self.V) + 1]
        self.slots = [self.N + 1 - n for n in range(self.N)]  # of N + 2 rows

    def pools(self, interval: int, rollback: int) -> list[Tensor]:
        """conv_state, recurrent_state, and where there are such step_buffer and state_position, with old numbers."""
        S, H, K, V = self.N + 2, self.H, self.K, self.V
        conv = torch.full((S, self.W - 1 + rollback, H * V), torch.nan, dtype=self.dtype)
        state = torch.full((S, H, K, V), torch.nan, dtype=self.state_dtype)
        if not buffer_rows(interval, rollback):
            return [t.to(self.device) for t in (conv, state)]
        buffer = torch.full((S, H, buffer_rows(interval, rollback), K + V + EXTRA), torch.nan)
        position = torch.arange(S * H, dtype=torch.int32).view(S, H) % 7
        if self.dtype == torch.float64:
            buffer = buffer.double()
        return [t.to(self.device) for t in (conv, state, buffer, position)]

    def run(
        self, plan: list[Call], interval: int = 1, rollback: int = 0, start: list[int] | None = None, pools: Any = None
    ) -> Run:
        """From empty sequences, or from those of another run: its pools and their context lengths `start`."""
        pools = self.pools(interval, rollback) if pools is None else pools
        context = list(start or [0] * self.N)
        out = torch.full((self.N, self.positions, self.H * self.V), torch.nan)
        for i, call in enumerate(plan):
            self.feed(call, i, context, pools, interval, out)
            context = [c + t for c, t in zip(context, call.tokens, strict=True)]
        return Run(self, out, pools, context)

    def feed(self, call: Call, seed: int, context: list[int], pools: list[Tensor], interval: int, out: Tensor) -> None:
        other = torch.Generator().manual_seed(100 + seed)
        rejected = call.rejected or [0] * self.N
        lens = [max(1, a + b) for a, b in zip(call.tokens, rejected, strict=True)]
        rows = []
        for x in self.inputs:
            parts = []
            for n, size in enumerate(lens):
                known = x[n, context[n] : context[n] + call.tokens[n]]
                more = 3 * torch.randn(size - len(known), x.shape[-1], generator=other).to(x.dtype)
                parts.append(torch.cat([known, more]))
            rows.append(torch.cat(parts))
        slots = [s if t else -1 for s, t in zip(self.slots, call.tokens, strict=True)]
        batch = [torch.tensor(x, dtype=torch.int32) for x in ([0, *lens], slots, context)]
        batch[0] = batch[0].cumsum(0).int()
        conv, state, *buffer = pools
        args = [t.to(self.device) for t in (*rows, *self.weights)], [t.to(self.device) for t in batch]
        sizes = self.H, self.K, self.V, 1e-5, call.form
        o = self.block(*args[0], conv, state, *args[1], *sizes, *(buffer or (None, None)), interval).float().cpu()
        begin = 0
        for n, size in enumerate(lens):
            kept = call.tokens[n]
            out[n, context[n] : context[n] + kept] = o[begin : begin + kept]
            assert kept or not o[begin : begin + size].any(), "a padding row's output is zero"
            begin += size


@dataclass
class Run:
    streams: Streams
    out: Tensor  # [N, positions, D] of the tokens that were kept; NaN elsewhere
    pools: list[Tensor]
    context: list[int]

    def outputs(self) -> Tensor:
        """[tokens, D]"""
        return torch.cat([self.out[n, :c] for n, c in enumerate(self.context)])

    def states(self) -> Tensor:
        """[N, H, K, V]: the recurrent states with what is in their buffers."""
        _, state, *more = [p.cpu() for p in self.pools]
        buffer, position = more or (None, None)
        slots, context = (torch.tensor(x, dtype=torch.int32) for x in (self.streams.slots, self.context))
        return current_state(state, buffer, position, slots, context, self.streams.dtype)
