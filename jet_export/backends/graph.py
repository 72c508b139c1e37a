"""The graphs that are exported: their signature, inputs to trace them with, and which sizes are dynamic.

prefill(input_ids [T], cu_seqlens [N+1], slots [N], context_lens [N], block_table [N, P], window_block_table [N, R],
        logit_indices [M], states) -> logits [M, vocab]: prompt chunks, and beside them sequences that decode (the
        ops' form MIXED);   decode is the same without logit_indices and with one token a sequence (DECODE),
        decode_one is decode with N == 1, whose linear layers read every weight once (kernels/gemv.py),
        decode_few is decode with N <= MAX_FEW_ROWS, by kernels/skinny_gemm.py,
        verify is decode with 1 to Dtypes.rollback tokens a sequence, ragged, and logits of all T tokens (VERIFY).
All sizes but the model's are dynamic, the number of rows of every pool included. States are graph inputs, updated in
place.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from jet_export.backends.modes import FEW_ROWS, MAX_FEW_ROWS, ONE_ROW, VERIFY
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch, allocate_states, pages_per_sequence
from jet_export.model.jet_nemotron import JetNemotronForCausalLM

MAX_ROWS = 2**20  # upper bound of pool rows and table widths in the exported ranges
INPUTS = (
    "input_ids",
    "cu_seqlens",
    "slots",
    "context_lens",
    "block_table",
    "window_block_table",
    "logit_indices",
)


class EngineGraph(nn.Module):
    """The model with a graph's flat signature."""

    def __init__(self, model: JetNemotronForCausalLM, form: Form, interval: int = 1) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.interval = interval

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
        interval = self.interval
        return self.model.forward_packed(input_ids, batch, states, logit_indices, self.form, interval=interval).logits


def form_of(mode: str) -> Form:
    """The form of a graph's calls."""
    return {"prefill": Form.MIXED, VERIFY: Form.VERIFY}.get(mode, Form.DECODE)


def example_inputs(model: JetNemotronForCausalLM, dtypes: Dtypes, mode: str) -> tuple[Any, ...]:
    """Inputs to trace with: three sequences (one for decode_one), pools of sizes that are all different."""
    device, n = model.device, 1 if mode == ONE_ROW else 3
    lens = {"prefill": [5, 9, 3], VERIFY: [2, 1, 2]}.get(mode, [1] * n)
    pages, ring = pages_per_sequence(model.config, 640, 256)
    states = allocate_states(
        dtypes.specs(model.config), {"slots": 7, "pages": 3 * pages + 2, "window_pages": 3 * ring + 3}, device
    )

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


def dynamic_shapes(model: JetNemotronForCausalLM, dtypes: Dtypes, limits: Limits, mode: str) -> tuple[Any, ...]:
    """torch.export's dynamic_shapes for `example_inputs`."""
    max_tokens = max(limits.max_prefill_tokens, 32)
    # One sequence more in prefill: the tokens that a captured call has too many belong to it (runtime/calls.py).
    most = max(limits.max_batch_size, 4) + (mode == "prefill")
    most = min(most, MAX_FEW_ROWS) if mode == FEW_ROWS else most
    n = None if mode == ONE_ROW else Dim("sequences", min=1, max=most)
    t = Dim("tokens", min=1, max=max_tokens) if mode == "prefill" else n
    if mode == VERIFY:
        t = Dim("tokens", min=1, max=max(most * dtypes.rollback, 8))
    pages, ring = Dim("table_pages", min=1, max=MAX_ROWS), Dim("ring_pages", min=1, max=MAX_ROWS)
    rows = {name: Dim(name, min=1, max=MAX_ROWS) for name in ("slots", "pages", "window_pages")}
    pools = [{0: rows[s.rows]} for s in dtypes.specs(model.config)]
    kinds = set(model.config.layer_types)
    indices = {0: Dim("outputs", min=1, max=max_tokens)} if mode == "prefill" else None
    table = {0: n, 1: pages if "attn" in kinds else Dim.AUTO}
    window = {0: n, 1: ring if "swa" in kinds else Dim.AUTO}
    return {0: t}, {0: n + 1 if n else None}, {0: n}, {0: n}, table, window, indices, pools


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch's warnings about its own internals out of the build's output; errors stay."""
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


def feeds(
    names: list[str], input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]
) -> dict[str, Tensor]:
    """The graph's inputs by name. `names`: those of the states."""
    return dict(zip((*INPUTS, *names), (input_ids, *batch, logit_indices, *states), strict=True))
