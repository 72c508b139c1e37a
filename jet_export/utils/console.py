"""What the terminal shows: the console that tables are printed to, and sizes for people."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """Wide enough for the tables where the output is a file."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def human(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}" if n < 100 else f"{n:.0f} {unit}"
        n /= 1000
    raise AssertionError
