"""torch.export of the model's graphs and their AOTInductor packages.

prefill(input_ids [T], cu_seqlens [N+1], slots [N], context_lens [N], block_table [N, P], window_block_table [N, R],
        logit_indices [M], states) -> logits [M, vocab];   decode is the same without logit_indices and with T == N,
        decode_one is decode with N == 1, whose linear layers read every weight once (kernels/gemv.py).
All sizes but the model's are dynamic, the number of rows of every pool included. States are graph inputs, updated in
place. Weights are left out of the packages: they are given one copy when they are loaded.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from jet_export.model.cache import PackedBatch, allocate_states, pages_per_sequence, state_specs
from jet_export.model.jet_nemotron import JetNemotronForCausalLM

MODES = ("prefill", "decode")
ONE_ROW = "decode_one"
MAX_ROWS = 2**20  # upper bound of pool rows and table widths in the exported ranges


def modes_for(device: str, decode_one: bool = True) -> tuple[str, ...]:
    """The packages of a bundle: for a GPU also decode of one sequence, which reading weights limits there."""
    return (*MODES, ONE_ROW) if device == "cuda" and decode_one else MODES


class EngineGraph(nn.Module):
    """The model behind the flat signature that engines have."""

    def __init__(self, model: JetNemotronForCausalLM, decode: bool) -> None:
        super().__init__()
        self.model = model
        self.decode = decode

    def forward(
        self,
        input_ids: Tensor,  # [T] int64
        cu_seqlens: Tensor,  # [N + 1] int32
        slots: Tensor,  # [N] int32
        context_lens: Tensor,  # [N] int32
        block_table: Tensor,  # [N, P] int32
        window_block_table: Tensor,  # [N, R] int32
        logit_indices: Tensor | None,  # [M] int32, None in the decode graph
        states: list[Tensor],
    ) -> Tensor:
        batch = PackedBatch(cu_seqlens, slots, context_lens, block_table, window_block_table)
        return self.model.forward_packed(input_ids, batch, states, logit_indices, self.decode).logits


def example_inputs(
    model: JetNemotronForCausalLM, kv_dtype: torch.dtype, state_dtype: torch.dtype, mode: str
) -> tuple[Any, ...]:
    """Inputs to trace with: three sequences (one for decode_one), pools of sizes that are all different."""
    device, n = model.device, 1 if mode == ONE_ROW else 3
    lens = [5, 9, 3] if mode == "prefill" else [1] * n
    pages, ring = pages_per_sequence(model.config, 640, 256)
    specs = state_specs(model.config, model.dtype, kv_dtype, state_dtype)
    states = allocate_states(specs, {"slots": 7, "pages": 3 * pages + 2, "window_pages": 3 * ring + 3}, device)

    def i32(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    table = torch.arange(n * pages, dtype=torch.int32, device=device).reshape(n, pages)
    window = torch.arange(n * ring, dtype=torch.int32, device=device).reshape(n, ring)
    ends = [0]
    for length in lens:
        ends.append(ends[-1] + length)
    ids = torch.zeros(sum(lens), dtype=torch.int64, device=device)
    indices = i32([e - 1 for e in ends[1:]]) if mode == "prefill" else None
    return ids, i32(ends), i32(range(n)), i32([0] * n), table, window, indices, states


def dynamic_shapes(model: JetNemotronForCausalLM, max_tokens: int, max_batch: int, mode: str) -> tuple[Any, ...]:
    n = None if mode == ONE_ROW else Dim("sequences", min=1, max=max(max_batch, 4))
    t = Dim("tokens", min=1, max=max(max_tokens, 32)) if mode == "prefill" else n
    pages, ring = Dim("table_pages", min=1, max=MAX_ROWS), Dim("ring_pages", min=1, max=MAX_ROWS)
    rows = {name: Dim(name, min=1, max=MAX_ROWS) for name in ("slots", "pages", "window_pages")}
    pools = [{0: rows[s.rows]} for s in state_specs(model.config, model.dtype)]
    kinds = set(model.config.layer_types)
    indices = {0: Dim("outputs", min=1, max=max(max_tokens, 32))} if mode == "prefill" else None
    table = {0: n, 1: pages if "attn" in kinds else Dim.AUTO}
    window = {0: n, 1: ring if "swa" in kinds else Dim.AUTO}
    return {0: t}, {0: n + 1 if n else None}, {0: n}, {0: n}, table, window, indices, pools


@contextmanager
def quiet_inductor():
    """Leave torch's own warnings about its internals out of the build's output; errors stay."""
    loggers = [logging.getLogger(n) for n in ("torch._inductor", "torch._dynamo", "torch._export", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


INPUTS = (
    "input_ids", "cu_seqlens", "slots", "context_lens", "block_table", "window_block_table", "logit_indices",
)  # fmt: skip


def feeds(
    names: list[str], input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]
) -> dict[str, Tensor]:
    """The graph's inputs by name; `names` are the states'."""
    return dict(zip((*INPUTS, *names), (input_ids, *batch, logit_indices, *states), strict=True))
