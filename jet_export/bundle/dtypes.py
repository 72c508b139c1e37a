"""The dtypes of an engine and how it keeps its states, and the dtypes' names in a manifest and on the command line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jet_export.model.cache import StateSpec, state_specs
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError, shown


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, {"fp8": "float8_e4m3fn"}.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise JetExportError(f"dtype {shown(name)} is not known.", "Known: bfloat16, float32, fp8 (KV cache).")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """What an engine computes in, and what its pools hold."""

    model: torch.dtype  # activations, convolution states, and the weights that are not FP8
    kv_cache: torch.dtype
    state: torch.dtype = torch.float32  # recurrent states
    state_interval: int = 1  # they are written every so many tokens
    rollback: int = 0  # the most tokens of a sequence in a call that verifies drafts; 0: there is no such call
    mtp: bool = False  # the hidden states are kept, for a multi-token-prediction layer
    fast_accumulation: bool = False  # of FP8 products, see model/fp8.py

    @classmethod
    def named(
        cls,
        *,
        model: str,
        kv_cache: str,
        state: str,
        state_interval: int = 1,
        rollback: int = 0,
        mtp: bool = False,
        fast_accumulation: bool = False,
    ) -> Dtypes:
        """Raises JetExportError for a name that is not known."""
        return cls(
            model=torch_dtype(model),
            kv_cache=torch_dtype(kv_cache),
            state=torch_dtype(state),
            state_interval=state_interval,
            rollback=rollback,
            mtp=mtp,
            fast_accumulation=fast_accumulation,
        )

    def specs(self, config: JetNemotronConfig) -> list[StateSpec]:
        """The pools of an engine of these dtypes."""
        return state_specs(
            config,
            self.model,
            kv_dtype=self.kv_cache,
            state_dtype=self.state,
            interval=self.state_interval,
            rollback=self.rollback,
            hidden=self.mtp,
        )
