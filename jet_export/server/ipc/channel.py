"""Frames over a Unix stream socket: 4 bytes of length, 1 of kind, the payload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
HEADER = struct.Struct("=IB")
MAX_FRAME = 1 << 28  # bytes
MAX_UNSENT = 1 << 28  # bytes; a peer that is this far behind has hung
READ = 1 << 16  # bytes at once


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(kind, payload) of the frames that `data` completes. Raises ValueError for one longer than MAX_FRAME."""
        self._data += data
        start = 0
        try:
            while len(self._data) - start >= HEADER.size:
                length, kind = HEADER.unpack_from(self._data, start)
                if length > MAX_FRAME:
                    raise ValueError(f"a frame of {length} bytes")
                end = start + HEADER.size + length
                if len(self._data) < end:
                    return
                payload = bytes(memoryview(self._data)[start + HEADER.size : end])
                start = end
                yield kind, payload
        finally:
            del self._data[:start]


class Channel:
    """One end of the connection. `send` may be called from any thread, everything else in the event loop.

    `on_frame(kind, payload)` gets each frame. `on_close()` is called once, when the other end is gone or what it sends
    makes no sense, and not after `close`.
    """

    def __init__(
        self, sock: socket.socket, on_frame: Callable[[int, bytes], None], on_close: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._socket, self._on_frame, self._on_close = sock, on_frame, on_close
        self._frames = Frames()
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self.closed = False

    def open(self) -> None:
        """Read in the running event loop from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def send(self, kind: int, payload: bytes) -> None:
        """Send a frame; does nothing once the other end is gone. Never waits: what the socket does not take is sent
        by the event loop."""
        frame = HEADER.pack(len(payload), kind) + payload
        with self._lock:
            if self.closed:
                return
            if not self._unsent:
                frame = frame[self._write(frame) :]
                if not frame:
                    return
                self._call(self._loop.add_writer, self._socket, self._send_rest)
            self._unsent += frame
            if len(self._unsent) > MAX_UNSENT:
                self._unsent.clear()
                self._call(self._fail)

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._unsent.clear()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(lambda: None if self.closed else function(*args))

    def _write(self, data: bytes | bytearray) -> int:
        """Bytes taken; all of them once the other end is gone, which reading then finds."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)

    def _send_rest(self) -> None:
        with self._lock:
            del self._unsent[: self._write(self._unsent)]
            if not self._unsent:
                self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._fail()
            return
        try:
            for kind, payload in self._frames.feed(data):
                self._on_frame(kind, payload)
                if self.closed:
                    return
        except Exception:
            log.exception("a message makes no sense; the connection is closed")
            self._fail()

    def _fail(self) -> None:
        if not self.closed:
            self.close()
            self._on_close()
