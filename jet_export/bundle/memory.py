"""How many bytes a model, its states and its steps take: counted from the architecture, before anything is built."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.model.cache import BESIDE_STATE, mtp_spec, pages_per_sequence
from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8 import FP8_PROJECTIONS


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that an engine holds at once, by what they are for."""

    weights: int
    recurrent_states: int  # with the tokens that are kept beside them
    conv_states: int
    kv_full: int  # full-attention layers, with what a multi-token-prediction layer keeps
    kv_window: int  # sliding-window layers
    workspace: int  # activations of the largest prefill step, estimated
    rope_table: int

    @property
    def total(self) -> int:
        return sum(self.__dict__.values())


def parameter_count(c: JetNemotronConfig) -> int:
    from jet_export.model.weights import checkpoint_layout  # imports torch's compiler, which serving does not need

    return sum(torch.Size(s.shape).numel() for s in checkpoint_layout(c).values())


def weight_bytes(c: JetNemotronConfig, dtype: torch.dtype, fp8: bool, lm_head_fp8: bool = False) -> int:
    """Weights on the device: FP8 projections 1 byte; A_log, dt_bias and norms of 1 + w fp32; others the model dtype."""
    from jet_export.model.weights import checkpoint_layout  # imports torch's compiler, which serving does not need

    total = 0
    for s in checkpoint_layout(c).values():
        size = dtype.itemsize
        if fp8 and s.param.endswith(".weight") and s.param.split(".")[-2] in FP8_PROJECTIONS:
            size = 1
        elif s.offset or s.param.endswith(("A_log", "dt_bias")):
            size = 4
        total += torch.Size(s.shape).numel() * size
    return total + (c.vocab_size * c.hidden_size if lm_head_fp8 else 0)


def predictor_bytes(c: JetNemotronConfig, dtype: torch.dtype) -> int:
    """Of a multi-token-prediction layer: one layer of attention, norms and a matrix of the layer's own."""
    from jet_export.model.mtp import predictor_layout  # imports torch's compiler, which serving does not need

    slices = predictor_layout(c).values()
    return sum(torch.Size(s.shape).numel() * (4 if s.offset else dtype.itemsize) for s in slices)


def engine_memory(c: JetNemotronConfig, limits: Limits, dtypes: Dtypes, weights: int) -> Memory:
    """Everything resident while the engine runs at `limits`. `weights`: their bytes."""
    n = limits.max_batch_size
    pages, ring = pages_per_sequence(c, limits.max_seq_len, limits.prefill_chunk)
    rows = {"slots": n, "pages": n * pages, "window_pages": n * ring}
    size = {"conv_state": 0, "recurrent_state": 0, "pages": 0, "window_pages": 0}
    for s in dtypes.specs(c):
        kind = s.rows if s.rows != "slots" else s.name.rsplit(".", 1)[1]
        kind = "recurrent_state" if kind in BESIDE_STATE else kind
        size[kind] += rows[s.rows] * s.row_bytes
    if dtypes.mtp:
        size["pages"] += rows["pages"] * mtp_spec(c, dtypes.model).row_bytes
    tokens = min(limits.max_prefill_tokens, n * limits.max_seq_len)
    return Memory(
        weights=weights,
        recurrent_states=size["recurrent_state"],
        conv_states=size["conv_state"],
        kv_full=size["pages"],
        kv_window=size["window_pages"],
        workspace=tokens * workspace_per_token(c, dtypes.model),
        rope_table=limits.max_seq_len * c.rope_dim * dtypes.model.itemsize,
    )


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """A model to run, and the bytes of a device that it may take."""

    config: JetNemotronConfig
    dtypes: Dtypes
    weights: int  # bytes
    available: int  # bytes, weights included

    def memory(self, limits: Limits) -> Memory:
        return engine_memory(self.config, limits, self.dtypes, self.weights)

    def largest_batch(self, *, max_seq_len: int, prefill_chunk: int) -> int:
        """The most sequences of `max_seq_len` tokens that fit; 0 where not one does."""

        def fits(n: int) -> bool:
            limits = Limits(max_batch_size=n, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)
            return self.memory(limits).total <= self.available

        most = 1
        while fits(most):
            most *= 2
        low = most // 2  # fits, or 0
        while most - low > 1:
            middle = (low + most) // 2
            low, most = (middle, most) if fits(middle) else (low, middle)
        return low


USABLE = 0.92  # of a GPU's memory: the rest goes to CUDA's context and to fragmentation


def available_memory(device: torch.device) -> int:
    """Bytes that a process may still allocate: 92 % of a GPU's free memory, 80 % of a host's MemAvailable."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(0.8 * 1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        return int(0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def free_cached(device: torch.device) -> None:
    """Return torch's cached blocks to the GPU, so that they count as free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def workspace_per_token(c: JetNemotronConfig, dtype: torch.dtype) -> int:
    """Activations alive at once in the widest part of a layer: residual, and the MLP's or the JetBlock's."""
    residual = 3 * c.hidden_size
    mlp = 3 * c.intermediate_size
    jet = 0
    for dims in {c.jet_dims(i) for i, kind in enumerate(c.layer_types) if kind == "jet"}:
        D, HK, R = dims.value_dim, c.key_dim(dims), c.generator_dim_of(dims.value_dim)
        kappa = c.conv_size * D if R else c.conv_dim(dims)  # a static convolution: its output
        jet = max(jet, 2 * HK + 2 * D + R + kappa + 2 * dims.num_heads * dims.head_k_dim + 4 * D)
    return (residual + max(mlp, jet)) * dtype.itemsize
