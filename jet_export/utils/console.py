"""Output for people: the console that tables are printed to, and sizes in readable units."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """The terminal's width; where the output is a file, wide enough for the tables."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def human(n: float) -> str:
    """Bytes as "512 B", "1.5 KB", "80.0 GB"; powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}" if n < 100 else f"{n:.0f} {unit}"
        n /= 1000
    raise AssertionError
