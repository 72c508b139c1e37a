"""The graphs of a multi-token-prediction layer (model/mtp.py): pairs of hidden states and the tokens behind them.

mtp_prefill(input_ids [T], hidden [T, hidden], cu_seqlens [N + 1], slots [N], context_lens [N], block_table [N, P],
            logit_indices [M], kv_cache) -> logits [M, vocab], hidden [M, hidden]: pairs of any number (MIXED);
mtp_decode  is the same without logit_indices and with one pair a sequence (DECODE).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from jet_export.backends.graph import MAX_ROWS
from jet_export.backends.modes import MTP_DECODE
from jet_export.bundle.limits import Limits
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch, allocate_states, mtp_spec
from jet_export.model.jet_nemotron import JetNemotronForCausalLM


class MtpGraph(nn.Module):
    """The layer with a graph's flat signature."""

    def __init__(self, model: JetNemotronForCausalLM, mode: str) -> None:
        super().__init__()
        self.model, self.form = model, Form.DECODE if mode == MTP_DECODE else Form.MIXED

    def forward(
        self,
        input_ids: Tensor,  # [T] int64
        hidden: Tensor,  # [T, hidden]
        cu_seqlens: Tensor,  # [N + 1] int32
        slots: Tensor,  # [N] int32
        context_lens: Tensor,  # [N] int32
        block_table: Tensor,  # [N, P] int32
        logit_indices: Tensor | None,  # [M] int32, None in mtp_decode
        kv_cache: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch = PackedBatch(cu_seqlens, slots, context_lens, block_table, block_table)
        assert self.model.mtp is not None
        out: tuple[Tensor, Tensor] = self.model.mtp(input_ids, hidden, batch, logit_indices, kv_cache, self.form)
        return out


def example_inputs(model: JetNemotronForCausalLM, mode: str) -> tuple[Any, ...]:
    """Inputs to trace with: three sequences, in pools that have room for more."""
    device, ends = model.device, [0, 1, 2, 3] if mode == MTP_DECODE else [0, 5, 14, 17]

    def i32(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    ids = torch.zeros(ends[-1], dtype=torch.int64, device=device)
    hidden = torch.zeros(ends[-1], model.config.hidden_size, dtype=model.dtype, device=device)
    table = i32(range(15)).reshape(3, 5)
    (kv_cache,) = allocate_states([mtp_spec(model.config, model.dtype)], {"pages": 17}, device)
    indices = None if mode == MTP_DECODE else i32([e - 1 for e in ends[1:]])
    return ids, hidden, i32(ends), i32(range(3)), i32([0] * 3), table, indices, kv_cache


def dynamic_shapes(limits: Limits, mode: str) -> tuple[Any, ...]:
    """torch.export's dynamic_shapes for `example_inputs`."""
    # One sequence more where padding needs one (runtime/calls.py), as in backends/graph.py.
    n = Dim("sequences", min=1, max=max(limits.max_batch_size, 4) + (mode != MTP_DECODE))
    most = max(limits.max_prefill_tokens, 32)
    t = n if mode == MTP_DECODE else Dim("tokens", min=1, max=most)
    indices = None if mode == MTP_DECODE else {0: Dim("outputs", min=1, max=most)}
    pages, rows = Dim("table_pages", min=1, max=MAX_ROWS), Dim("pages", min=1, max=MAX_ROWS)
    return {0: t}, {0: t}, {0: n + 1}, {0: n}, {0: n}, {0: n, 1: pages}, indices, {0: rows}
