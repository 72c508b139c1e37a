"""States carried between calls: their shapes, their pools, and the batch API's cache over them.

Each layer has its own pools (never views of a stacked one), rows picked by slot (JetBlocks) or page (attention):
    jet   conv_state [S, conv_size-1, C] model dtype, C = D or 2 HK K + D (config.conv_dim), recurrent_state
          [S, H, K, V] fp32 or bf16; where the state is written every `interval` tokens, or `rollback` tokens can be
          taken back, also step_buffer [S, H, interval - 1 + rollback, K + V + 4] fp32 and state_position [S, H] int32
          (kernels/step_buffer.py), and conv_state has `rollback` rows more (a ring)
    attn  kv_cache [pages, 2, Hkv, PAGE, head_dim], pages named by block_table [N, M]
    swa   the same over window_block_table, a ring: position p lies in page (p // PAGE) % M
and, where a multi-token-prediction layer drafts (mtp.py), one pool more, the last: hidden_states [pages, 1, 1, PAGE,
hidden] behind the last norm, in the pages of full attention: shared, copied and taken back with the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from jet_export.kernels.state_layout import EXTRA, buffer_rows
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError

PAGE = 128  # tokens per KV page
HIDDEN = "hidden_states"
BESIDE_STATE = ("step_buffer", "state_position")  # pools of the tokens since a recurrent state was written


class PackedBatch(NamedTuple):
    """Which tokens belong to which sequence, and where that sequence's states are. N sequences, T packed tokens."""

    cu_seqlens: Tensor  # [N + 1] int32
    slots: Tensor  # [N] int32; < 0: a padding row
    context_lens: Tensor  # [N] int32, tokens already held
    block_table: Tensor  # [N, M] int32
    window_block_table: Tensor  # [N, R] int32


@dataclass(frozen=True)
class StateSpec:
    """One pool. `rows`: what its first dimension counts ("slots", "pages" or "window_pages")."""

    name: str
    layer: int
    rows: str
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        n = self.dtype.itemsize
        for d in self.shape:
            n *= d
        return n


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def state_specs(
    config: JetNemotronConfig,
    dtype: torch.dtype,
    *,
    kv_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    interval: int = 1,
    rollback: int = 0,
    hidden: bool = False,
) -> list[StateSpec]:
    """Every layer's pools, in the order in which graphs take them.

    `interval`: the recurrent states are written every so many tokens; `rollback`: so many tokens of a call can be
    taken back, the most of a sequence in a call of the form VERIFY; `hidden`: the hidden states are kept."""
    c, specs = config, []
    kv_shape = (2, c.num_key_value_heads, PAGE, c.head_dim)
    for i, kind in enumerate(c.layer_types):
        if kind == "jet":
            dims = c.jet_dims(i)
            conv, state = (c.conv_size - 1 + rollback, c.conv_dim(dims)), tuple(dims)
            specs.append(StateSpec(f"layers.{i}.conv_state", i, "slots", conv, dtype))
            specs.append(StateSpec(f"layers.{i}.recurrent_state", i, "slots", state, state_dtype))
            if tokens := buffer_rows(interval, rollback):
                H, K, V = dims
                buffer = (H, tokens, K + V + EXTRA)
                specs.append(StateSpec(f"layers.{i}.step_buffer", i, "slots", buffer, torch.float32))
                specs.append(StateSpec(f"layers.{i}.state_position", i, "slots", (H,), torch.int32))
        else:
            rows = "pages" if kind == "attn" else "window_pages"
            specs.append(StateSpec(f"layers.{i}.kv_cache", i, rows, kv_shape, kv_dtype or dtype))
    if hidden:
        specs.append(StateSpec(f"layers.{i}.{HIDDEN}", i, "pages", (1, 1, PAGE, c.hidden_size), dtype))
    return specs


def mtp_spec(config: JetNemotronConfig, dtype: torch.dtype) -> StateSpec:
    """The cache of a multi-token-prediction layer, which has pages of its own."""
    return StateSpec("mtp.kv_cache", 0, "pages", (2, config.num_key_value_heads, PAGE, config.head_dim), dtype)


def pages_per_sequence(config: JetNemotronConfig, max_seq_len: int, prefill_chunk: int) -> tuple[int, int]:
    """(pages of a full-attention layer, pages of a sliding-window ring) that one sequence needs."""
    pages = cdiv(max_seq_len, PAGE)
    ring = cdiv(config.window_size + min(prefill_chunk, max_seq_len), PAGE) + 1
    return pages, min(pages, ring)


def allocate_states(specs: list[StateSpec], rows: dict[str, int], device: torch.device) -> list[Tensor]:
    """Zeroed pools; `rows` gives the number of slots, pages and window_pages."""
    return [torch.zeros(rows[s.rows], *s.shape, dtype=s.dtype, device=device) for s in specs]


def states_per_layer(config: JetNemotronConfig, states: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Each layer's pools, of those of all layers: two or four of a JetBlock, one of an attention layer."""
    blocks = sum(kind == "jet" for kind in config.layer_types)
    others = len(config.layer_types) - blocks
    per_block = (len(states) - others) // max(blocks, 1)
    it = iter(states)
    return [tuple(islice(it, per_block if kind == "jet" else 1)) for kind in config.layer_types]


class Cache:
    """States of a fixed batch. `context_lens` [B] int32 is on the device; `length`, the longest row, on the host."""

    def __init__(
        self,
        *,
        states: list[Tensor],
        block_table: Tensor,
        window_block_table: Tensor,
        max_seq_len: int,
        prefill_chunk: int,
    ) -> None:
        self.states = states
        self.block_table = block_table
        self.window_block_table = window_block_table
        self.max_seq_len = max_seq_len
        self.prefill_chunk = prefill_chunk
        self.batch_size = block_table.shape[0]
        self.slots = torch.arange(self.batch_size, dtype=torch.int32, device=block_table.device)
        self.context_lens = torch.zeros(self.batch_size, dtype=torch.int32, device=block_table.device)
        self.length = 0

    @classmethod
    def allocate(
        cls,
        config: JetNemotronConfig,
        *,
        batch_size: int,
        max_seq_len: int,
        prefill_chunk: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
    ) -> Cache:
        pages, ring = pages_per_sequence(config, max_seq_len, prefill_chunk)
        rows = {"slots": batch_size, "pages": batch_size * pages, "window_pages": batch_size * ring}
        states = allocate_states(state_specs(config, dtype, kv_dtype=kv_dtype, state_dtype=state_dtype), rows, device)
        table = torch.arange(batch_size * pages, dtype=torch.int32, device=device).reshape(batch_size, pages)
        window = torch.arange(batch_size * ring, dtype=torch.int32, device=device).reshape(batch_size, ring)
        return cls(
            states=states,
            block_table=table,
            window_block_table=window,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk,
        )

    def check_room(self, batch_size: int, tokens: int) -> None:
        if batch_size != self.batch_size:
            raise JetExportError(f"cache: made for batch size {self.batch_size}, called with {batch_size}.")
        if tokens > self.prefill_chunk:
            raise JetExportError(f"cache: {tokens} tokens in one call, prefill_chunk is {self.prefill_chunk}.")
        if self.length + tokens > self.max_seq_len:
            raise JetExportError(
                f"cache: {self.length} tokens held and {tokens} more exceed max_seq_len {self.max_seq_len}.",
                "Allocate it with new_cache(batch_size, a larger max_seq_len).",
            )
        self.length += tokens

    def batch(self, tokens: int, mask: Tensor | None) -> PackedBatch:
        """The packed view of [B, tokens] ids; `mask` [B, tokens] leaves padding out."""
        if mask is None:
            ends = torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.slots.device) * tokens
        else:
            ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        # context_lens is cloned, because `advance` changes the cache's own in place.
        return PackedBatch(ends, self.slots, self.context_lens.clone(), self.block_table, self.window_block_table)

    def advance(self, batch: PackedBatch) -> None:
        self.context_lens.add_(batch.cu_seqlens.diff())
