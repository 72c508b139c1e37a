"""Ends the process of a server whose engine will not come back, so that a supervisor starts another one.

A step that never returns (a kernel that spins, a driver that waits) holds every request, and no exception says so;
after an error of the device (an illegal access, a GPU that has fallen off the bus) every later call fails too. Either
is logged with its place, /health answers 503, and the process ends with status ENGINE_LOST.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from jet_export.runtime.engine_thread import EngineThread
from jet_export.utils.errors import ENGINE_LOST, JetExportError

log = logging.getLogger(__name__)
POLL = 1.0  # seconds, at most
LAST_ANSWERS = 1.0  # seconds for errors to reach the clients, before the process ends
FRAMES = 4  # of the stepping thread, in the log's first line


class Watchdog:
    """Over a started engine, while the process lives. `step_timeout`: seconds that a step may take; 0: no limit."""

    def __init__(
        self,
        engine: EngineThread,
        step_timeout: float,
        *,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not step_timeout >= 0:  # nan too
            raise JetExportError(f"--step-timeout {step_timeout}: not a time.", "Give seconds; 0: no limit.")
        self.engine, self.step_timeout, self.end, self.clock = engine, step_timeout, end, clock

    def start(self) -> None:
        threading.Thread(target=self._watch, name="jet-watchdog", daemon=True).start()

    def _watch(self) -> None:
        while not self.check():
            time.sleep(min(POLL, self.step_timeout / 4 or POLL))

    def check(self) -> bool:
        """Whether the process has been told to end."""
        if self.engine.lost is not None:
            log.critical("the device is lost (%s); the process ends with status %d", self.engine.lost, ENGINE_LOST)
            time.sleep(LAST_ANSWERS)
            self.end(ENGINE_LOST)
            return True
        began = self.engine.step_began
        if not self.step_timeout or began is None or self.clock() - began <= self.step_timeout:
            return False
        self.engine.stopping = True  # /health: 503. Without the lock, which the step may hold
        where = place(self.engine.thread) if self.engine.thread else "its start"
        log.critical(
            "the engine hangs: a step has taken more than %g s, at %s; the process ends with status %d",
            self.step_timeout,
            where,
            ENGINE_LOST,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        self.end(ENGINE_LOST)
        return True


def place(thread: threading.Thread) -> str:
    """Where a thread is: its innermost frames, innermost first."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    stack = traceback.extract_stack(frame)[-FRAMES:] if frame else []
    return " < ".join(f"{f.name} ({os.path.basename(f.filename)}:{f.lineno})" for f in reversed(stack)) or "its end"
