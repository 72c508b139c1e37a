"""Safetensors files: one message for whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from jet_export.utils.errors import JetExportError


@contextmanager
def reading_tensors(path: Path, todo: str) -> Iterator[None]:
    """Around what reads a file. Raises JetExportError where it is missing, damaged or truncated. `todo`: what to do."""
    try:
        yield
    except FileNotFoundError:
        raise JetExportError(f"{path}: no such file.", todo) from None
    except (SafetensorError, OSError) as e:
        raise JetExportError(f"{path}: damaged or truncated ({e}).", todo) from None
