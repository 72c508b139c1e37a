"""What a step must move and compute at the least, counted from a bundle's files and states, and the time that takes.

Decode, a step of B sequences that hold n tokens each:

    bytes = weights + B (2 recurrent states + 2 convolution states + n KV bytes a token + min(n, window) of the windows)

Prefill: the products of the projections and of attention, and the recurrence, at the speed of a large matrix product;
or the bytes, where they take longer. Speeds are measured in the same process on the same device (bench.copy_speed,
bench.matmul_speed). Weights: every tensor of weights.safetensors but the RoPE table, and but the embedding where the
output projection is a matrix of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from jet_export.bench.timer import copy_speed, matmul_speed
from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.model.cache import PAGE, StateSpec
from jet_export.model.config import JetNemotronConfig

CHUNK = 64  # of the delta rule's chunk form
FP8 = torch.float8_e4m3fn
SAFETENSORS = {"F8_E4M3": FP8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Weights:
    """read: bytes that every step reads. products: multiply-adds a token of the layers' projections, by dtype."""

    read: int
    resident: int
    products: dict[torch.dtype, int]


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step moves, at the least."""

    weights: int
    recurrent_states: int  # read and written
    conv_states: int  # read and written
    kv_full: int
    kv_window: int

    @property
    def total(self) -> int:
        return sum(self.__dict__.values())


@dataclass(frozen=True)
class Peaks:
    """The device's own speeds: bytes/s of a copy (read plus written), FLOP/s of a product by dtype."""

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
    products: dict[torch.dtype, int] = {}
    for name, (dtype, n, dims) in sizes.items():
        if name.startswith("layers.") and dims == 2:
            products[dtype] = products.get(dtype, 0) + n
    return Weights(sum(b for n, b in nbytes.items() if n not in unread), sum(nbytes.values()), products)


def step_bytes(c: JetNemotronConfig, specs: list[StateSpec], weights: int, batch: int, context: float) -> StepBytes:
    """Of one decode step. `context`: tokens held."""
    size = {"recurrent_state": 0.0, "conv_state": 0.0, "pages": 0.0, "window_pages": 0.0}
    for s in specs:
        if s.rows == "slots":
            size[s.name.rsplit(".", 1)[1]] += 2 * s.row_bytes
        else:
            held = context if s.rows == "pages" else min(context, c.window_size)
            size[s.rows] += s.row_bytes / PAGE * held
    recurrent, conv, full, window = (int(batch * n) for n in size.values())
    return StepBytes(weights, recurrent, conv, full, window)


def mixer_flops(c: JetNemotronConfig, context: int) -> float:
    """Of one sequence's prefill: attention's products and the delta rule's, without the projections."""
    total = 0.0
    for i, kind in enumerate(c.layer_types):
        if kind == "jet":
            H, K, V = c.jet_dims(i)
            total += context * H * (2 * CHUNK * (3 * K + 2 * V) + 6 * K * V)
        else:
            window = min(context, c.window_size) if kind == "swa" else context
            pairs = window * (window + 1) / 2 + (context - window) * window  # of query and visible key
            total += 4 * c.head_dim * c.num_attention_heads * pairs
    return total


def decode_seconds(moved: StepBytes, peaks: Peaks) -> float:
    """The least time of a decode step: its bytes at copy speed."""
    return moved.total / peaks.copy


def prefill_seconds(
    c: JetNemotronConfig, specs: list[StateSpec], weights: Weights, peaks: Peaks, dtype: torch.dtype,
    batch: int, context: int, chunk: int, calls: int,
) -> float:  # fmt: skip
    """The least time of filling `batch` sequences with `context` tokens in `calls` calls: products or bytes."""
    products = sum(2 * n * batch * context / peaks.matmul[product_dtype(d, peaks)] for d, n in weights.products.items())
    compute = products + batch * mixer_flops(c, context) / peaks.matmul[product_dtype(dtype, peaks)]
    moved = calls * weights.read
    for begin in range(0, context, chunk):
        step = step_bytes(c, specs, 0, batch, begin)
        moved += step.total
    return max(compute, moved / peaks.copy)


def product_dtype(dtype: torch.dtype, peaks: Peaks) -> torch.dtype:
    """The dtype whose peak holds for a product of this one: its own, or what the device widens it to."""
    return dtype if dtype in peaks.matmul else torch.float32


def product_dtypes(manifest: Manifest) -> set[torch.dtype]:
    """The dtypes of a bundle's matrix products; on a CPU, FP8 codes are widened to fp32."""
    dtypes = {torch_dtype(manifest.dtype), torch.float32}
    if manifest.quantization and manifest.device.type == "cuda":
        dtypes.add(FP8)
    return dtypes
