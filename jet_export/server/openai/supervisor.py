"""Starts the front ends of an engine and keeps them running until SIGTERM or SIGINT. The event loop here also takes
their requests; the engine's thread sends them the tokens."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable

from jet_export.runtime.batching import BatchingEngine
from jet_export.server.ipc.engine_server import EngineServer, Link
from jet_export.server.openai.frontend import FrontEndConfig
from jet_export.server.openai.options import API_KEY
from jet_export.utils.errors import EngineLost, JetExportError

log = logging.getLogger(__name__)
MODULE = "jet_export.server.openai.frontend"
MAX_RESTARTS, RESTART_WINDOW = 3, 60.0  # more restarts than this in so many seconds end the server
LEAVE = 7.0  # seconds for a front end to exit once its requests have ended
WATCH = 0.5  # seconds between looks at the engine's thread


class FrontEnds:
    """One front end for each listener, over one engine.

    A front end that dies is started again, with the same listener, and its requests are cancelled. JetExportError if
    one cannot start or too many die, or the engine's thread ends: every stream then ends with an error.
    """

    def __init__(self, batching: BatchingEngine, listeners: list[socket.socket], config: FrontEndConfig) -> None:
        self.batching, self.listeners, self.config = batching, listeners, config
        self.server = EngineServer(batching)
        self._links: dict[Link, Process] = {}
        self._unready = len(listeners)
        self._deaths: deque[float] = deque(maxlen=MAX_RESTARTS + 1)  # times
        self._draining = False

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop, then let running requests finish; `on_ready()` once every front end listens."""
        gc.freeze()
        asyncio.run(self._run(on_ready))

    async def _run(self, on_ready: Callable[[], None]) -> None:
        self.batching.start()
        stop = asyncio.Event()
        for s in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(s, self._on_signal, stop)
        ends = {asyncio.create_task(self._keep_running(listener, on_ready)) for listener in self.listeners}
        others = {asyncio.create_task(self._watch_engine()), asyncio.create_task(stop.wait())}
        try:
            done, _ = await asyncio.wait(ends | others, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await self._drain(ends)
        finally:
            self._draining = True
            for link in list(self._links):  # their streams end with an error
                self.server.disconnect(link)
            await asyncio.wait(ends, timeout=LEAVE)
            for process in self._links.values():
                process.kill()
            for task in ends | others:
                task.cancel()
            await asyncio.gather(*ends, *others, return_exceptions=True)
            self.batching.stop()

    def _on_signal(self, stop: asyncio.Event) -> None:
        if stop.is_set():  # a second one: do not wait for the requests
            self.batching.close()
        stop.set()

    async def _drain(self, ends: set[asyncio.Task[None]]) -> None:
        self._draining = True
        for listener in self.listeners:
            listener.close()
        for link in self._links:
            link.drain()
        grace = self.config.grace
        timer = asyncio.get_running_loop().call_later(grace, self.batching.close)
        await asyncio.wait(ends, timeout=grace + LEAVE)
        timer.cancel()

    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            if not self.batching.alive and not self._draining:
                raise EngineLost("The engine's thread has ended; see the log.", "Start the server again.")

    async def _keep_running(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Run a front end on this listener, and another one when it dies."""
        first = True
        while not self._draining:
            ready = asyncio.Event()
            status = await self._run_one(listener, ready, on_ready if first else lambda: None)
            if self._draining:
                return
            if not ready.is_set():
                raise JetExportError(f"A front end ended with status {status} before it was ready; see the log above.")
            first = False
            now = time.monotonic()
            self._deaths.append(now)
            if len(self._deaths) > MAX_RESTARTS and now - self._deaths[0] < RESTART_WINDOW:
                raise JetExportError(
                    f"{len(self._deaths)} front ends died within {RESTART_WINDOW:.0f} s, the last with status {status}."
                )
            log.error("a front end died with status %d; its requests are cancelled, another one starts", status)

    def environment(self) -> dict[str, str]:
        """Of a front end: it finds the API key there."""
        key = self.config.options.api_key
        return {**os.environ, API_KEY: key} if key else {k: v for k, v in os.environ.items() if k != API_KEY}

    async def _run_one(self, listener: socket.socket, ready: asyncio.Event, on_ready: Callable[[], None]) -> int:
        """A front end from start to end; its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", MODULE, self.config.encode(), str(theirs.fileno()), str(listener.fileno())),
                pass_fds=(theirs.fileno(), listener.fileno()),
                start_new_session=True,  # Ctrl-C is for this process, which tells the front ends
                env=self.environment(),
            )

        def on_first_ready() -> None:
            ready.set()
            self._unready -= 1
            if self._unready == 0:
                on_ready()

        def kill() -> None:
            if process.returncode is None:
                process.kill()

        def on_lost() -> None:  # it usually ends by itself
            asyncio.get_running_loop().call_later(LEAVE, kill)

        link = self.server.connect(ours, on_first_ready, on_lost)
        self._links[link] = process
        if self._draining:
            link.drain()
        try:
            return await process.wait()
        finally:
            del self._links[link]
            self.server.disconnect(link)
