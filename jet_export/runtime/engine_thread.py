"""The thread that takes an engine's steps while it has requests."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod

from jet_export.runtime.plan import Request
from jet_export.runtime.sequence import RunningSequence
from jet_export.utils.errors import device_lost

log = logging.getLogger(__name__)


class EngineThread(ABC):
    """Whoever changes `sequences`, the requests that have not ended, holds `lock` and notifies `work`."""

    sequences: dict[Request, RunningSequence]

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.work = threading.Condition(self.lock)
        self.thread: threading.Thread | None = None
        self.stopping = False
        self.step_began: float | None = None  # of the step that runs now, by time.monotonic
        self.lost: Exception | None = None  # the error after which the device does no more work

    @property
    @abstractmethod
    def failure(self) -> Exception | None:
        """Why the last request that ended with an error did so."""

    @abstractmethod
    def step(self) -> bool: ...

    @abstractmethod
    def cancel(self, sequence: RunningSequence, reason: str = "cancelled") -> None: ...

    @abstractmethod
    def prepare(self) -> None:
        """Before the first step: whatever would keep a request waiting."""

    def start(self) -> None:
        """`prepare`, and start the thread that takes the steps."""
        self.prepare()
        self.thread = threading.Thread(target=self._loop, name="jet-engine", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Cancel all requests and refuse new ones."""
        with self.lock:
            self.stopping = True
            self._cancel_all("cancelled")
            self.work.notify()

    def stop(self) -> None:
        """Close, and wait for the thread to end."""
        self.close()
        if self.thread:
            self.thread.join()
            self.thread = None

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive() and not self.stopping

    def _cancel_all(self, reason: str) -> None:
        for sequence in list(self.sequences.values()):
            self.cancel(sequence, reason)

    def _loop(self) -> None:
        while True:
            with self.lock:
                while not self.stopping and not self.sequences:
                    self.work.wait()
                if self.stopping:
                    return
            self.step_began = time.monotonic()
            try:
                self.step()
            except Exception as e:
                log.exception("the engine failed; every request ends with an error")
                self._give_up(e)
            finally:
                self.step_began = None
            if device_lost(self.failure):
                self._give_up(self.failure)
            if self.lost is not None:
                return

    def _give_up(self, e: Exception | None) -> None:
        """End every request with an error; refuse new ones where the device is lost."""
        with self.lock:
            if device_lost(e):
                self.stopping, self.lost = True, e
            self._cancel_all("error")
