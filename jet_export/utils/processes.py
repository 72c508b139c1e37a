"""Processes that end when their parent does. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def signal_at_parents_end(number: signal.Signals) -> None:
    """Send this process a signal when its parent ends, for whatever reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end_with_parent(parent: int) -> None:
    """Kill this process when its parent, the process `parent`, ends; exit now if it has ended already."""
    signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
