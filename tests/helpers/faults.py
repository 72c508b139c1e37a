"""Engines with one defect each, for tests that verify notices: eager engines, so that nothing is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jet_export.backends.eager import EagerEngine
from jet_export.model.cache import PackedBatch
from jet_export.model.fp8 import Fp8Linear, quantize, widen


class FaultyEngine(EagerEngine):
    """An eager engine over its own copy of the model's modules (weights shared until a fault changes them)."""

    def __init__(self, eager: EagerEngine) -> None:
        memo = {id(t): t for t in (*eager.model.parameters(), *eager.model.buffers())}
        self.__dict__.update(eager.__dict__)
        self.model = copy.deepcopy(eager.model, memo)

    def attention(self, kind: str) -> list:
        return [layer.self_attn for layer in self.model.layers if layer.kind == kind]


class StateNotCarried(FaultyEngine):
    """Every call starts its JetBlocks from zero states."""

    def _forget(self, batch: PackedBatch, states: list[Tensor]) -> None:
        for spec, pool in zip(self.specs, states, strict=True):
            if spec.rows == "slots":
                pool[batch.slots[batch.slots >= 0].long()] = 0

    def prefill(self, input_ids, batch, logit_indices, states):
        self._forget(batch, states)
        return super().prefill(input_ids, batch, logit_indices, states)

    def decode(self, input_ids, batch, states):
        self._forget(batch, states)
        return super().decode(input_ids, batch, states)


class DraftsKept(FaultyEngine):
    """Tokens of a verify call are steps like any other: what is taken back stays in the states."""

    def verify(self, input_ids, batch, states):
        logits = [torch.empty(0)] * len(input_ids)
        for t in range(int(batch.cu_seqlens.diff().max())):
            rows = (batch.cu_seqlens.diff() > t).nonzero()[:, 0]
            at = batch.cu_seqlens[rows].long() + t
            ends = torch.arange(len(rows) + 1, dtype=torch.int32)
            part = [x[rows] for x in batch[1:]]
            part[1] = part[1] + t
            for i, row in zip(at.tolist(), self.decode(input_ids[at], PackedBatch(ends, *part), states), strict=True):
                logits[i] = row
        return torch.stack(logits)


class SlotsSwapped(FaultyEngine):
    """Decode reads and writes the states of two sequences the wrong way round."""

    def decode(self, input_ids, batch, states):
        slots, live = batch.slots.clone(), (batch.slots >= 0).nonzero()[:2, 0]
        slots[live] = batch.slots[live.flip(0)]
        return super().decode(input_ids, batch._replace(slots=slots), states)


def window_off(by: int) -> Callable[[EagerEngine], EagerEngine]:
    def make(eager: EagerEngine) -> EagerEngine:
        engine = FaultyEngine(eager)
        for m in engine.attention("swa"):
            m.window += by
        return engine

    return make


def k_scale_off(eager: EagerEngine) -> EagerEngine:
    """The scale of an FP8 cache doubled, for keys stored and read alike."""
    engine = FaultyEngine(eager)
    for m in engine.attention("attn"):
        m.k_scale *= 2
    return engine


class Scaled(nn.Module):
    """A linear layer whose output columns are multiplied by `factors`."""

    def __init__(self, linear: nn.Module, factors: Tensor) -> None:
        super().__init__()
        self.linear, self.factors = linear, factors

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factors


def keys_scaled(eager: EagerEngine) -> EagerEngine:
    """Keys of the full-attention layers 3 % too large: a softmax scale off by as much."""
    engine = FaultyEngine(eager)
    for m in engine.attention("attn"):
        q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        factors = torch.ones(q + 2 * kv, dtype=engine.dtype)
        factors[q : q + kv] = 1.03
        m.qkv_proj = Scaled(m.qkv_proj, factors)
    return engine


class ConvStateShifted(FaultyEngine):
    """The convolution's state is read one tap late."""

    def _shift(self, batch: PackedBatch, states: list[Tensor]) -> None:
        held = batch.slots[(batch.slots >= 0) & (batch.context_lens > 0)].long()
        for spec, pool in zip(self.specs, states, strict=True):
            if spec.name.endswith("conv_state"):
                pool[held] = pool[held].roll(1, 1)

    def prefill(self, input_ids, batch, logit_indices, states):
        self._shift(batch, states)
        return super().prefill(input_ids, batch, logit_indices, states)

    def decode(self, input_ids, batch, states):
        self._shift(batch, states)
        return super().decode(input_ids, batch, states)


def rope_off(eager: EagerEngine) -> EagerEngine:
    """Every token is rotated as the one after it."""
    engine = FaultyEngine(eager)
    engine.model.cos_sin = eager.model.cos_sin.roll(-1, 0)
    return engine


FAULTS: dict[str, Callable[[EagerEngine], EagerEngine]] = {
    "state not carried": StateNotCarried,
    "two slots swapped": SlotsSwapped,
    "window one too long": window_off(1),
    "window one too short": window_off(-1),
    "conv state shifted": ConvStateShifted,
    "RoPE position off by one": rope_off,
}


class SplitProducts(nn.Module):
    """A linear layer evaluated in another order: halves of the sum apart, added in fp32, rounded once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        w, half = self.linear.weight, x.shape[-1] // 2
        y = x[:, :half].float() @ w[:, :half].float().T + x[:, half:].float() @ w[:, half:].float().T
        return (y if self.linear.bias is None else y + self.linear.bias.float()).to(x.dtype)


class FusedMLP(nn.Module):
    """silu(gate) * up rounded once, as a compiler fuses it, not twice."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj

    def forward(self, h: Tensor, norm: nn.Module, ahead: tuple[nn.Module, ...] = ()) -> Tensor:
        """h + MLP(norm(h))."""
        gate, up = self.gate_up_proj(norm(h)).float().chunk(2, dim=-1)
        return h + self.down_proj((nn.functional.silu(gate) * up).to(h.dtype))


def other_rounding(eager: EagerEngine) -> EagerEngine:
    """No fault: an engine that rounds differently."""
    engine = FaultyEngine(eager)
    for layer in engine.model.layers:
        layer.mlp = FusedMLP(layer.mlp)
    for path, module in list(engine.model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            engine.model.set_submodule(path, SplitProducts(module))
    return engine


class FastSums(nn.Module):
    """An FP8 layer whose products are summed in a tensor core's register, 32 at a time: all of them and the sum so far
    are cut to a multiple of 2^-bits of the largest one's power of two, and added exactly."""

    def __init__(self, linear: Fp8Linear, bits: int) -> None:
        super().__init__()
        self.linear, self.bits = linear, bits

    def forward(self, x: Tensor) -> Tensor:
        fp8 = self.linear
        q, w = quantize(x, fp8.input_scale).float(), widen(fp8.weight)
        y = torch.zeros(len(q), len(w))
        for k in range(0, q.shape[1], 32):
            products = q[:, None, k : k + 32] * w[None, :, k : k + 32]  # [T, N, 32]
            largest = products.abs().amax(-1).maximum(y.abs()).clamp(min=1e-30)
            unit = torch.exp2(largest.log2().floor() - self.bits)
            y = ((products / unit[..., None]).trunc().sum(-1) + (y / unit).trunc()) * unit
        y = y * (fp8.input_scale * fp8.weight_scale)
        return (y if fp8.bias is None else y + fp8.bias.float()).to(x.dtype)


def fast_accumulation(eager: EagerEngine, bits: int) -> EagerEngine:
    """No fault with 13 bits, which Hopper has: `build --fast-accumulation`."""
    engine = FaultyEngine(eager)
    for path, module in list(engine.model.named_modules()):
        if isinstance(module, Fp8Linear):
            engine.model.set_submodule(path, FastSums(module, bits))
    return engine
