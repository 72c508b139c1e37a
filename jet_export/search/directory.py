"""The output directory of a search, and the record of which search it holds."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from jet_export.utils.errors import JetExportError
from jet_export.utils.files import existing, write_atomically

if TYPE_CHECKING:
    from jet_export.search.run import Search

RECORD = "search.json"


def check_output(search: Search, resume: bool) -> None:
    """Raises JetExportError where the output holds anything else than this search, to `resume`, or cannot be made."""
    record = search.output / RECORD
    there = existing(search.output)
    if not there.is_dir():
        raise JetExportError(f"--output {search.output}: {there} is no directory.", "Choose another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise JetExportError(f"--output {search.output}: {there} cannot be written to.", "Choose another place.")
    if record.exists():
        try:
            before = json.loads(record.read_text())
        except (ValueError, OSError):
            before = {}
        before = before if isinstance(before, dict) else {}
        differing = sorted(k for k, v in search.identity().items() if before.get(k) != v)
        if differing:
            raise JetExportError(f"{search.output}: holds another search ({', '.join(differing)} differ).",
                                 "Pass another --output DIR.")  # fmt: skip
        if not resume:
            raise JetExportError(f"{search.output}: holds this search already.",
                                 "Pass --resume to go on with it, or another --output DIR.")  # fmt: skip
    elif search.output.exists() and any(search.output.iterdir()):
        raise JetExportError(f"--output {search.output}: is not empty and holds no search.", "Choose another place.")


def open_output(search: Search) -> None:
    """The output directory with the search's identity."""
    search.output.mkdir(parents=True, exist_ok=True)
    write_atomically(search.output / RECORD, json.dumps(search.identity(), indent=1, allow_nan=False) + "\n")
