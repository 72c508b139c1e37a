"""`jet-export verify --ladder`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jet_export.ladder.climb import FAILED, PASSED, climb, summary, table
from jet_export.report import console
from jet_export.verify import read_text

REPORT = Path("ladder.json")
STATUS = {PASSED: 0, FAILED: 1}
INCOMPLETE_STATUS = 3  # nothing failed; not everything ran


def run_ladder(
    bundle: Path | None,
    report: Path | None,
    headers: Path | None,
    fetch_headers: bool,
    text: Path | None,
    seed: int,
    emit: Callable[[str], None],
) -> int:
    """Climb, print the rungs and where the report is. Returns the exit status."""
    report = report or REPORT
    if text is not None:
        read_text(text)  # refused before anything runs
    result = climb(bundle, report, emit, headers, fetch_headers, text, seed)
    out = console()
    out.print(table(result))
    out.print(summary(result), markup=False)
    out.print(f"Report, to keep or to share: {report}", markup=False)
    return STATUS.get(result["outcome"], INCOMPLETE_STATUS)
