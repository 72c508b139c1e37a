"""Listening sockets, and uvicorn as the servers here run it."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

GRACE = 10.0  # seconds that running requests have to finish after SIGTERM
# A client may send its next request just when an idle connection is closed, and then sees a reset: longer than the idle
# times of the usual clients and proxies (60 s).
KEEP_ALIVE = 75.0
OPEN_FILES = 65536  # one for each connection
FEW_FILES = 4096


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files. Raises JetExportError if they are not a certificate and its key."""

    certfile: str
    keyfile: str

    def __post_init__(self) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certfile, self.keyfile, password=lambda: b"")  # asks nobody for one
        except OSError as e:
            raise JetExportError(
                f"--ssl-certfile {self.certfile} --ssl-keyfile {self.keyfile}: {e}.",
                "Give a PEM certificate (chain) and its key, without a password.",
            ) from None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose port `listen_too` can share."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        if port:
            socket.create_server((host, port), family=family).close()  # fails if another program has the port
        return socket.create_server((host, port), family=family, reuse_port=True)
    except (OSError, OverflowError) as e:
        raise JetExportError(f"--host {host} --port {port}: {e}.", "Choose another address or port.") from None


def listen_too(listener: socket.socket) -> socket.socket:
    """Another socket on the same port: the kernel spreads the connections over them."""
    return socket.create_server(listener.getsockname()[:2], family=listener.family, reuse_port=True)


def url(listener: socket.socket, tls: Tls | None = None) -> str:
    scheme, (host, port) = "https" if tls else "http", listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def raise_file_limit(log: Callable[[str], None]) -> None:
    """Allow as many connections as this user may have, here and in the processes started from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if 0 <= soft < FEW_FILES:
        log(f"open files are limited to {soft}, and connections with them; raise it (ulimit -Hn) to have more")


def http_server(
    app: ASGIApp,
    *,
    keep_alive: float = KEEP_ALIVE,
    grace: float = GRACE,
    on_started: Callable[[], None] = lambda: None,
    close: Callable[[], None] = lambda: None,
    tls: Tls | None = None,
) -> uvicorn.Server:
    """`on_started()` once it listens; `close()` if requests still run `grace` seconds after it is told to stop."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            timer = asyncio.get_running_loop().call_later(grace, close)
            await super().shutdown(sockets)
            timer.cancel()

    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=max(1, round(keep_alive)),
            timeout_graceful_shutdown=int(grace) + 5,  # covers clients that do not read their answers
            ssl_certfile=tls.certfile if tls else None,
            ssl_keyfile=tls.keyfile if tls else None,
        )
    )


def run_server(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until SIGTERM, SIGINT or `should_exit`, then let running requests finish."""
    # Once it has shut down, uvicorn raises the signal again for the previous handler.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
