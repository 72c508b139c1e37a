"""A stop that waits for the step to end: SIGTERM, and the first SIGINT, ask for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """`asked`: whether a signal has come."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second ctrl-C ends it at once


@contextmanager
def stop_at_signals() -> Iterator[Stop]:
    """Outside the main thread, where Python has no handlers, a Stop that nobody asks for."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, stop.ask) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
