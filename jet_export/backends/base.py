"""The engine interface: one step over packed tokens.

An engine is stateless: every call takes the pools (in the order of `specs`) and updates them in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from jet_export.bundle.limits import Limits
from jet_export.model.cache import PackedBatch, StateSpec
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError


class Engine(ABC):
    """Runs one step over packed tokens. `config`, `limits` and `specs` describe the steps and states that it takes."""

    config: JetNemotronConfig
    limits: Limits
    specs: list[StateSpec]
    dtype: torch.dtype
    device: torch.device
    state_interval: int = 1  # the recurrent states are written every so many tokens, see kernels/step_buffer.py
    rollback: int = 0  # the most tokens of a sequence in `verify`; 0: there is no such call
    mtp: bool = False  # there is `predict`, and calls leave the hidden states of their tokens in the last pool
    dependent_launch: bool = False  # its kernels wait for their inputs themselves, see kernels/common.py

    @abstractmethod
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        """Prompt chunks, and single tokens of sequences that decode, in any mix: input_ids [T] int64, logit_indices [M]
        int32 (rows of the packed tokens) -> logits [M, vocab]."""

    @abstractmethod
    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        """One token a sequence: input_ids [N] int64 -> logits [N, vocab]."""

    def verify(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        """1 to `rollback` tokens a sequence, ragged: input_ids [T] int64 -> logits [T, vocab], of every token.

        All tokens are held afterwards. To take the last ones back, give the next call a smaller context_lens: at
        least this call's and one token more. Raises JetExportError for an engine whose rollback is 0."""
        raise JetExportError("this engine has no call that verifies drafts.", "Build the bundle with --speculate N.")

    def predict(
        self, input_ids: Tensor, hidden: Tensor, batch: PackedBatch, logit_indices: Tensor | None, kv_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The multi-token-prediction layer, over pairs of a hidden state [T, hidden] and the token behind it,
        input_ids [T] int64 -> logits [M, vocab] of the token behind that, and hidden states [M, hidden] to go on with.

        `logit_indices` [M] int32: rows of the packed pairs; None: one pair a sequence, all of them. `kv_cache`: of the
        layer (cache.mtp_spec), its pages by `batch.block_table`. Raises JetExportError for an engine without it."""
        raise JetExportError("this engine has no multi-token-prediction layer.", "Build the bundle with --mtp.")
