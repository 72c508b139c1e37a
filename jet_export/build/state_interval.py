"""`build --state-interval`: the tokens between two writes of a recurrent state, a number or what the table says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jet_export.kernels import configs
from jet_export.kernels.form import MAX_VERIFY
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError

AUTO = "auto"
MOST = 64  # tokens


@dataclass(frozen=True)
class Interval:
    """`source`: the measurements behind it."""

    tokens: int
    source: str


def parse_interval(text: str) -> int | None:
    """A number of tokens; None: what the table of configurations says. Raises JetExportError for anything else."""
    if text == AUTO:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST:
        raise JetExportError(
            f"--state-interval {text}: no number of tokens from 1 to {MOST}.", f"Give one, or {AUTO} (by the GPU)."
        )
    return int(text)


def table_interval(
    config: JetNemotronConfig, state_dtype: torch.dtype, sm: int | None, max_batch_size: int
) -> Interval:
    """What kernels/configs.json says for this model on this GPU (`sm`: 90 for 9.0; None: none). 1 without JetBlocks."""
    if "jet" not in config.layer_types:
        return Interval(1, "no recurrent states")
    rule = configs.rule_for(
        "state_interval",
        sm,
        state_dtype=state_dtype,
        head_k_dim=config.head_k_dim,
        head_v_dim=config.head_v_dim,
        max_batch_size=max_batch_size,
    )
    return Interval(rule.use["tokens"], rule.source)


def check_states(interval: int, speculate: int) -> None:
    """Raises JetExportError for a --state-interval or --speculate that is out of range."""
    for flag, value, low, high in (
        ("--state-interval", interval, 1, MOST),
        ("--speculate", speculate, 0, MAX_VERIFY - 1),
    ):
        if not low <= value <= high:
            raise JetExportError(f"{flag} {value}: it must be from {low} to {high}.")
