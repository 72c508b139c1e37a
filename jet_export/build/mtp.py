"""`build --mtp`: whether a multi-token-prediction layer can draft for the bundle."""

from __future__ import annotations

from pathlib import Path

from jet_export.model.config import JetNemotronConfig
from jet_export.model.mtp import check_predictor
from jet_export.model.qwen3_5 import TEXT
from jet_export.model.weights import CheckpointFiles
from jet_export.utils.errors import JetExportError


def check_mtp(speculate: int, config: JetNemotronConfig, backend: str, directory: Path | None) -> None:
    """`speculate`: the drafts that a step verifies; `directory`: the checkpoint's, where it is here already.

    Raises JetExportError for a model without the layer, and for a build that cannot draft by it."""
    if not speculate:
        raise JetExportError("--mtp: its drafts have to be verified.", "Say how many in a step, e.g. --speculate 3")
    if backend != "inductor":
        raise JetExportError(f"--mtp: not for {backend}.", "Build with --backend inductor, or draft by prompt lookup.")
    if config.model_type != TEXT:
        raise JetExportError(
            f"--mtp: {config.model_type} models have no multi-token-prediction layer.",
            "Leave it out: --speculate N is enough for prompt lookup and draft bundles.",
        )
    if directory is not None:
        check_predictor(CheckpointFiles.open(directory))
