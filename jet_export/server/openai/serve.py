"""`jet-export serve --openai`: serve a bundle over HTTP until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jet_export.runtime.capacity import Serving
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from fastapi import FastAPI

GRACE = 10  # seconds that running requests have to finish after SIGTERM
# A client may send its next request just when an idle connection is closed, and then sees a reset: longer than the idle
# times of the usual clients and proxies (60 s).
KEEP_ALIVE = 75.0


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Where the server listens, and how it treats connections."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    keep_alive: float = KEEP_ALIVE  # seconds that an idle connection stays open


def serve(bundle: Path, http: HttpOptions, serving: Serving, log: Callable[[str], None]) -> None:
    """Load the bundle and serve it until told to stop. Raises JetExportError if the extra [serve] is not installed."""
    if not 0 < http.keep_alive < math.inf:
        raise JetExportError(f"--keep-alive-timeout {http.keep_alive}: not a time.", "Give seconds, e.g. 75.")
    try:
        import uvicorn  # noqa: F401

        from jet_export.server.openai.app import create_app
    except ImportError as e:
        raise JetExportError(f"serve needs {e.name}.", "Install it: pip install 'jet-export[serve]'") from None
    from jet_export.bundle.manifest import Manifest
    from jet_export.runtime.async_llm import AsyncLLM
    from jet_export.server.openai.chat import load_chat_template

    listener = listen(http.host, http.port)
    llm = AsyncLLM(bundle, serving)
    name = str(Manifest.load(bundle).model["name"])
    template = load_chat_template(bundle)
    c = llm.batching.scheduler.capacity
    log(f"{name}: {c.slots} sequences at once, {c.pages} KV pages of {c.page_size} tokens, {c.max_seq_len} a sequence")
    if c.whole_chunks:
        log("deterministic: a request's bits do not depend on the others")
    if c.prefix_interval:
        log(f"prefix cache: {c.prefix_bytes / 2**20:.0f} MiB, prompts share whole blocks of {c.prefix_interval} tokens")
    for path in ("completions", "chat/completions") if template else ("completions",):
        log(f"POST {url(listener)}/v1/{path}")
    log(f"GET  {url(listener)}/v1/models  /health  /metrics")
    run(create_app(llm, name, template), listener, llm.batching.close, keep_alive=http.keep_alive)


def listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as e:
        raise JetExportError(f"--host {host} --port {port}: {e}.", "Choose another address or port.") from None


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: FastAPI,
    listener: socket.socket,
    close: Callable[[], None],
    grace: float = GRACE,
    keep_alive: float = KEEP_ALIVE,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish.

    After `grace` seconds `close` ends those that still run; each is answered with the reason.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            timer = asyncio.get_running_loop().call_later(grace, close)
            await super().shutdown(sockets)
            timer.cancel()

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, round(keep_alive)),
        timeout_graceful_shutdown=int(grace) + 5,  # covers clients that do not read their answers
    )
    # Once it has shut down, uvicorn raises the signal again for the previous handler.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        Server(config).run(sockets=[listener])
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
