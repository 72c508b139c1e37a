"""The output directory of a search, and the record of which search it holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jet_export.utils.errors import JetExportError
from jet_export.utils.files import existing, write_atomically

RECORD = "search.json"


def check_output(output: Path, identity: dict[str, Any], resume: bool) -> None:
    """Raises JetExportError if `output` cannot be created, or holds anything but this search with `resume` set."""
    record = output / RECORD
    there = existing(output)
    if not there.is_dir():
        raise JetExportError(f"--output {output}: {there} is no directory.", "Choose another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise JetExportError(f"--output {output}: {there} cannot be written to.", "Choose another place.")
    if record.exists():
        try:
            before = json.loads(record.read_text())
        except (ValueError, OSError):
            before = {}
        before = before if isinstance(before, dict) else {}
        differing = sorted(k for k, v in identity.items() if before.get(k) != v)
        if differing:
            raise JetExportError(
                f"{output}: holds another search ({', '.join(differing)} differ).", "Pass another --output DIR."
            )
        if not resume:
            raise JetExportError(
                f"{output}: holds this search already.", "Pass --resume to go on with it, or another --output DIR."
            )
    elif output.exists() and any(output.iterdir()):
        raise JetExportError(f"--output {output}: is not empty and holds no search.", "Choose another place.")


def open_output(output: Path, identity: dict[str, Any]) -> None:
    """Create the output directory and record the search's identity in it."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / RECORD, json.dumps(identity, indent=1, allow_nan=False) + "\n")
