"""Processes that end with the one that started them. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def signal_at_parents_end(number: signal.Signals) -> None:
    """This process gets the signal when its parent ends, however it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end_with_parent(parent: int) -> None:
    """SIGKILL when `parent`, an id, ends; at once where it has ended already."""
    signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
