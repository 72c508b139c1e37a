"""The least that a step must move and compute, counted from a bundle's files and states, and the time that this takes.

Decode, a step of B sequences that hold n tokens each:

    bytes = weights + B (2 recurrent states + 2 convolution states + n KV bytes a token + min(n, window) of the windows)

Where recurrent states are written every L tokens (kernels/step_buffer.py), a second roofline counts 1 + 1/L states
instead of 2, and of the rows [K + V + 4] fp32 that stand beside them (L - 1) / 2 read a step (0 to L - 1 are held) and
(L - 1) / L written.

Prefill: the products of the projections and of attention, and the recurrence, at the speed of a large matrix product;
or the bytes, where they take longer. Speeds are measured in the same process on the same device (timer.copy_speed,
timer.matmul_speed). Weights: every tensor of weights.safetensors except the RoPE table, and except the embedding where
the output projection is a matrix of its own; a multi-token-prediction layer (mtp.*) is read to draft alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jet_export.bench.measure import Case
from jet_export.bench.timer import copy_speed, matmul_speed
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.model.cache import HIDDEN, PAGE, StateSpec
from jet_export.model.config import JetNemotronConfig
from jet_export.model.qwen3_5 import MTP

CHUNK = 64  # of the delta rule's chunk form
FP8 = torch.float8_e4m3fn
SAFETENSORS = {"F8_E4M3": FP8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the weights cost a step."""

    read: int  # bytes that every step reads
    resident: int  # bytes in memory
    products: dict[torch.dtype, int]  # multiply-adds a token in the layers' projections


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """The least bytes that one decode step moves."""

    weights: int
    recurrent_states: int  # read at every step, written at every one or once in an interval
    conv_states: int  # read and written
    kv_full: int
    kv_window: int
    step_buffers: int = 0  # tokens held beside the states, read and written

    @property
    def total(self) -> int:
        return sum(self.__dict__.values())


@dataclass(frozen=True)
class Peaks:
    """The device's measured speeds: bytes/s of a copy (read plus written), FLOP/s of a product by dtype."""

    copy: float
    matmul: dict[torch.dtype, float]


def measure_peaks(device: torch.device, dtypes: set[torch.dtype]) -> Peaks:
    return Peaks(copy_speed(device=device), {dtype: matmul_speed(dtype, device) for dtype in dtypes})


def bundle_weights(bundle: Path) -> Weights:
    """From the header of weights.safetensors."""
    from safetensors import safe_open

    sizes: dict[str, tuple[torch.dtype, int, int]] = {}  # name -> dtype, elements, dimensions
    with safe_open(bundle / WEIGHTS, "pt") as f:
        for name in f.keys():  # noqa: SIM118  not a dict
            t = f.get_slice(name)
            shape = t.get_shape()
            sizes[name] = SAFETENSORS[t.get_dtype()], torch.Size(shape).numel(), len(shape)
    return count_weights(sizes)


def count_weights(sizes: dict[str, tuple[torch.dtype, int, int]]) -> Weights:
    """sizes: name -> dtype, elements, dimensions."""
    nbytes = {name: dtype.itemsize * n for name, (dtype, n, _) in sizes.items()}
    unread = {"cos_sin"} | ({"embed_tokens.weight"} if "lm_head.weight" in sizes else set())
    unread |= {name for name in sizes if name.startswith(MTP)}  # read to draft
    products: dict[torch.dtype, int] = {}
    for name, (dtype, n, dims) in sizes.items():
        if name.startswith("layers.") and dims == 2:
            products[dtype] = products.get(dtype, 0) + n
    read = sum(b for n, b in nbytes.items() if n not in unread)
    return Weights(read=read, resident=sum(nbytes.values()), products=products)


def step_bytes(c: JetNemotronConfig, specs: list[StateSpec], weights: int, batch: int, context: float) -> StepBytes:
    """The bytes of one decode step that writes the recurrent states. `weights`: those that it reads; `context`: tokens
    held by each sequence."""
    size = {"recurrent_state": 0.0, "conv_state": 0.0, "pages": 0.0, "window_pages": 0.0}
    for s in specs:
        kind = s.name.rsplit(".", 1)[1]
        if kind == "recurrent_state":
            size[kind] += 2 * s.row_bytes
        elif kind == "conv_state":  # rows of tokens that may be taken back are not read
            size[kind] += 2 * s.row_bytes / s.shape[0] * (c.conv_size - 1)
        elif s.rows != "slots" and kind != HIDDEN:  # written only
            held = context if s.rows == "pages" else min(context, c.window_size)
            size[s.rows] += s.row_bytes / PAGE * held
    recurrent, conv, full, window = (int(batch * n) for n in size.values())
    return StepBytes(weights=weights, recurrent_states=recurrent, conv_states=conv, kv_full=full, kv_window=window)


def spaced_bytes(step: StepBytes, specs: list[StateSpec], batch: int, interval: int) -> StepBytes:
    """The average step of `interval` ones, of which the last writes the recurrent states and each other a token beside
    them. `step`: one that writes the states."""
    row = sum(s.row_bytes // s.shape[1] for s in specs if s.name.endswith(".step_buffer"))
    moved = (interval - 1) / 2 + (interval - 1) / interval  # rows read and written
    states = step.recurrent_states // 2
    return replace(step, recurrent_states=states + states // interval, step_buffers=int(batch * row * moved))


def mixer_flops(c: JetNemotronConfig, context: int) -> float:
    """FLOP of one sequence's prefill in attention and the delta rule, without the projections.

    Products of q and k with k within a chunk are those of the key heads, which several heads of values may share."""
    total = 0.0
    for i, kind in enumerate(c.layer_types):
        if kind == "jet":
            dims = c.jet_dims(i)
            H, K, V = dims
            total += context * (2 * CHUNK * (2 * c.key_dim(dims) + H * (K + 2 * V)) + H * 6 * K * V)
        else:
            window = min(context, c.window_size) if kind == "swa" else context
            pairs = window * (window + 1) / 2 + (context - window) * window  # of query and visible key
            total += 4 * c.head_dim * c.num_attention_heads * pairs
    return total


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least times of one model's steps on one device."""

    config: JetNemotronConfig
    dtype: torch.dtype  # of the activations
    specs: list[StateSpec]
    weights: Weights
    peaks: Peaks

    def step_bytes(self, batch: int, context: float, interval: int = 1) -> StepBytes:
        step = step_bytes(self.config, self.specs, self.weights.read, batch, context)
        return spaced_bytes(step, self.specs, batch, interval)

    def decode_seconds(self, batch: int, context: float, interval: int = 1) -> float:
        """A decode step, averaged over `interval` of them: its bytes at copy speed."""
        return self.step_bytes(batch, context, interval).total / self.peaks.copy

    def prefill_seconds(self, case: Case) -> float:
        """Filling a case's sequences: its products or its bytes, whichever takes longer."""
        tokens = case.batch * case.context
        products = sum(2 * n * tokens / self.flops(dtype) for dtype, n in self.weights.products.items())
        mixers = case.batch * mixer_flops(self.config, case.context) / self.flops(self.dtype)
        moved = case.prefill_calls * self.weights.read
        for begin in range(0, case.context, case.chunk):
            moved += step_bytes(self.config, self.specs, 0, case.batch, begin).total
        return max(products + mixers, moved / self.peaks.copy)

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of a product of this dtype, or of fp32 where the device has to widen it."""
        return self.peaks.matmul[dtype if dtype in self.peaks.matmul else torch.float32]


def product_dtypes(manifest: Manifest) -> set[torch.dtype]:
    """The dtypes of a bundle's matrix products; on a CPU, FP8 codes are widened to fp32."""
    dtypes = {manifest.dtypes.model, torch.float32}
    if manifest.quantization and manifest.device.type == "cuda":
        dtypes.add(FP8)
    return dtypes
