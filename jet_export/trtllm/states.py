"""TensorRT-LLM's batch and states, in the form that jet::jet_block takes.

Its cache manager keeps, for each layer, an ssm pool [slots, H, V, K] and a conv pool [slots, D, W - 1]. Only this model
reads a slot's numbers, so the pools are viewed as [slots, H, K, V] and [slots, W - 1, D], without a copy. If a pool is
not contiguous (states inside the KV cache's blocks), the batch's rows are gathered and written back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jet_export.trtllm.adapt import state_slots
from jet_export.trtllm.protocols import AttentionMetadataLike
from jet_export.utils.errors import JetExportError


class Step(NamedTuple):
    """One forward pass of N sequences, contexts first."""

    cu_seqlens: Tensor  # [N + 1] int32
    slots: Tensor  # [N] int32
    context_lens: Tensor  # [N] int32; only zero or non-zero matters: zero starts from a zero state
    decode: bool  # one token per sequence


def step_of(metadata: AttentionMetadataLike, line: str) -> Step:
    """The step of TensorRT-LLM's batch.

    Generation sequences always hold tokens, so a captured decode step reads nothing from the host."""
    slots, lens = state_slots(metadata, line), metadata.seq_lens_cuda[: metadata.num_seqs]
    cu_seqlens = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
    held = torch.ones_like(slots)
    contexts = metadata.num_contexts
    if contexts:
        cached = metadata.kv_cache_params.num_cached_tokens_per_seq[:contexts]
        held[:contexts] = torch.tensor(cached, dtype=torch.int32).to(slots.device)
    return Step(cu_seqlens, slots, held, decode=contexts == 0)


class Pools(NamedTuple):
    """The states of one layer and the rows of this batch in them."""

    conv_state: Tensor  # [S, W - 1, D]
    recurrent_state: Tensor  # [S, H, K, V] fp32
    slots: Tensor  # [N] int32
    gathered: bool


def pools_of(conv: Tensor, ssm: Tensor, slots: Tensor, sizes: tuple[int, int, int, int]) -> Pools:
    """`sizes`: H, K, V, W. Raises JetExportError for pools of other shapes and for a state that is not fp32."""
    H, K, V, W = sizes
    if conv.shape[1:] != (H * V, W - 1) or ssm.shape[1:] != (H, V, K):
        raise JetExportError(
            f"JetNemotronForCausalLM: states [{list(conv.shape)}, {list(ssm.shape)}], not "
            f"[slots, {H * V}, {W - 1}] and [slots, {H}, {V}, {K}].",
            "The cache manager was made for another model.",
        )
    if ssm.dtype != torch.float32:
        raise JetExportError(f"JetNemotronForCausalLM: the recurrent state is {ssm.dtype}; it needs float32.")
    gathered = not (conv.is_contiguous() and ssm.is_contiguous())
    if gathered:
        conv, ssm = conv[slots.long()], ssm[slots.long()]
        slots = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
    return Pools(conv.view(-1, W - 1, H * V), ssm.view(-1, H, K, V), slots, gathered)


def write_back(pools: Pools, conv: Tensor, ssm: Tensor, slots: Tensor) -> None:
    """Write the new states of a gathered batch to their rows; pools used in place need nothing."""
    if pools.gathered:
        conv[slots.long()] = pools.conv_state.view(-1, *conv.shape[1:])
        ssm[slots.long()] = pools.recurrent_state.view(-1, *ssm.shape[1:])
