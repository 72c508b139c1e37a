"""How many bytes a model, its states and its steps take: counted from the architecture, before anything is built."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from jet_export.bundle.limits import Limits, max_prefill_tokens
from jet_export.model.cache import pages_per_sequence, state_specs
from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8 import FP8_PROJECTIONS


@dataclass(frozen=True)
class Memory:
    """Bytes, of which the engine needs all at once."""

    weights: int
    recurrent_states: int
    conv_states: int
    kv_full: int  # full-attention layers
    kv_window: int  # sliding-window layers
    workspace: int  # activations of the largest prefill step, estimated
    rope_table: int

    @property
    def total(self) -> int:
        return sum(self.__dict__.values())


def parameter_count(c: JetNemotronConfig) -> int:
    from jet_export.model.weights import checkpoint_layout  # imports torch's compiler, which a runtime does without

    return sum(torch.Size(s.shape).numel() for s in checkpoint_layout(c).values())


def weight_bytes(c: JetNemotronConfig, dtype: torch.dtype, fp8: bool, lm_head_fp8: bool = False) -> int:
    """Weights on the device: FP8 projections 1 byte, the rest in the model dtype, A_log and dt_bias in fp32."""
    from jet_export.model.weights import checkpoint_layout  # imports torch's compiler, which a runtime does without

    total = 0
    for s in checkpoint_layout(c).values():
        size = dtype.itemsize
        if fp8 and s.param.endswith(".weight") and s.param.split(".")[-2] in FP8_PROJECTIONS:
            size = 1
        elif s.param.endswith(("A_log", "dt_bias")):
            size = 4
        total += torch.Size(s.shape).numel() * size
    return total + (c.vocab_size * c.hidden_size if lm_head_fp8 else 0)


def engine_memory(
    c: JetNemotronConfig,
    limits: Limits,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    state_dtype: torch.dtype,
    weights: int,
) -> Memory:
    """Everything resident while the engine runs at `limits`."""
    n = limits.max_batch_size
    pages, ring = pages_per_sequence(c, limits.max_seq_len, limits.prefill_chunk)
    rows = {"slots": n, "pages": n * pages, "window_pages": n * ring}
    size = {"conv_state": 0, "recurrent_state": 0, "pages": 0, "window_pages": 0}
    for s in state_specs(c, dtype, kv_dtype, state_dtype):
        kind = s.rows if s.rows != "slots" else s.name.rsplit(".", 1)[1]
        size[kind] += rows[s.rows] * s.row_bytes
    tokens = min(max_prefill_tokens(n, limits.prefill_chunk), n * limits.max_seq_len)
    return Memory(
        weights=weights,
        recurrent_states=size["recurrent_state"],
        conv_states=size["conv_state"],
        kv_full=size["pages"],
        kv_window=size["window_pages"],
        workspace=tokens * workspace_per_token(c, dtype),
        rope_table=limits.max_seq_len * c.head_dim * dtype.itemsize,
    )


def largest_batch(
    c: JetNemotronConfig,
    tokens: int,
    chunk: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    state_dtype: torch.dtype,
    weights: int,
    available: int,
) -> int:
    """The most sequences of `tokens` tokens that `available` bytes hold, weights included; 0 where not one fits."""

    def fits(n: int) -> bool:
        return (
            engine_memory(
                c,
                Limits(max_batch_size=n, max_seq_len=tokens, prefill_chunk=chunk),
                dtype,
                kv_dtype,
                state_dtype,
                weights,
            ).total
            <= available
        )

    most = 1
    while fits(most):
        most *= 2
    low = most // 2  # fits, or 0
    while most - low > 1:
        middle = (low + most) // 2
        low, most = (middle, most) if fits(middle) else (low, middle)
    return low


USABLE = 0.92  # of a GPU's memory: the rest is its context's, and what fragments leave


def available_memory(device: torch.device) -> int:
    """Bytes that a process may still allocate: 92 % of what a GPU has free, 80 % of what a host calls available."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(0.8 * 1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def free_cached(device: torch.device) -> None:
    """Give memory that nothing holds back to the GPU, so that it counts as free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def workspace_per_token(c: JetNemotronConfig, dtype: torch.dtype) -> int:
    """Activations alive at once in the widest part of a layer: residual, and the MLP's or the JetBlock's."""
    residual = 3 * c.hidden_size
    mlp = 3 * c.intermediate_size
    jet = 0
    for dims in {c.jet_dims(i) for i, kind in enumerate(c.layer_types) if kind == "jet"}:
        D, HK = dims.value_dim, dims.num_heads * dims.head_k_dim
        R = D // c.dconv_generator_reduction
        jet = max(jet, 2 * HK + 2 * D + R + c.conv_size * D + 2 * HK + 4 * D)
    return (residual + max(mlp, jet)) * dtype.itemsize
