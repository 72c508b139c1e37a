"""`jet-export serve --openai`: serve a bundle over HTTP until SIGTERM or SIGINT."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jet_export.runtime.capacity import Serving
from jet_export.runtime.plan import Capacity
from jet_export.server.openai.http import (
    KEEP_ALIVE,
    Tls,
    http_server,
    listen,
    listen_too,
    raise_file_limit,
    run_server,
    url,
)
from jet_export.server.openai.options import ApiOptions
from jet_export.utils.errors import JetExportError
from jet_export.utils.progress import Progress

MAX_FRONTENDS = 64
# Python's 5 ms are longer than a step: the engine's thread would wait that long for one that takes in requests.
SWITCH_INTERVAL = 0.0005  # seconds


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Where the server listens, and how it treats connections."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    keep_alive: float = KEEP_ALIVE  # seconds that an idle connection stays open
    step_timeout: float = 0.0  # seconds that a step may take before the process ends; 0: no limit
    frontends: int | None = None  # processes for HTTP and text; 0: the engine's own; None: see `default_frontends`
    api: ApiOptions = field(default_factory=lambda: ApiOptions(names=()))  # no names: the bundle's
    tls: Tls | None = None
    generation_config: str = "none"  # "auto": the bundle's sampling defaults

    def __post_init__(self) -> None:
        """Raises JetExportError naming the option that is out of range."""
        if not 0 < self.keep_alive < math.inf:
            raise JetExportError(f"--keep-alive-timeout {self.keep_alive}: not a time.", "Give seconds, e.g. 75.")
        if self.generation_config not in ("auto", "none"):
            raise JetExportError(
                f"--generation-config {self.generation_config}: neither auto nor none.",
                "auto takes sampling defaults from the bundle's generation_config.json.",
            )
        if self.frontends is not None and not 0 <= self.frontends <= MAX_FRONTENDS:
            raise JetExportError(
                f"--frontends {self.frontends}: not between 0 and {MAX_FRONTENDS}.",
                "0 serves HTTP in the engine's process; 4 are enough for 16,000 tokens/s.",
            )


def default_frontends(device: str) -> int:
    """None on a CPU, where the engine itself needs the cores; on a GPU one for each four cores, at most four."""
    return 0 if device == "cpu" else max(1, min(4, len(os.sched_getaffinity(0)) // 4))


def serve(bundle: Path, http: HttpOptions, serving: Serving, log: Callable[[str], None]) -> None:
    """Load the bundle and serve it until told to stop. Raises JetExportError if the extra [serve] is not installed."""
    try:
        import uvicorn  # noqa: F401

        from jet_export.server.openai.app import create_app
    except ImportError as e:
        raise JetExportError(f"serve needs {e.name}.", "Install it: pip install 'jet-export[serve]'") from None
    from jet_export.bundle.manifest import Manifest
    from jet_export.runtime.async_llm import AsyncLLM
    from jet_export.runtime.watchdog import Watchdog
    from jet_export.server.openai.chat import load_chat_template, load_tokenizer_config
    from jet_export.server.openai.defaults import load_sampling_defaults
    from jet_export.server.openai.frontend import FrontEndConfig
    from jet_export.server.openai.middleware import log_access
    from jet_export.server.openai.spans import configure
    from jet_export.server.openai.supervisor import FrontEnds

    configure()
    template = load_chat_template(bundle, http.api.chat_template)
    defaults = load_sampling_defaults(bundle) if http.generation_config == "auto" else {}
    listener = listen(http.host, http.port)
    with Progress(log).stage(f"load {bundle}", lines=False):
        llm = AsyncLLM(bundle, serving)
    Watchdog(llm.batching, http.step_timeout).start()
    raise_file_limit(log)
    sys.setswitchinterval(SWITCH_INTERVAL)
    name = str(Manifest.load(bundle).model["name"])
    api = replace(http.api, names=http.api.names or (name,), sampling_defaults=defaults)
    if http.generation_config == "auto":
        values = ", ".join(f"{k} {v}" for k, v in defaults.items())
        log(f"sampling defaults of generation_config.json: {values or 'none'}")
    log_capacity(name, llm.batching.scheduler.capacity, log)
    if llm.batching.speculation:
        ways = {"lookup": "lookup in the request itself", "mtp": "the bundle's multi-token-prediction layer"}
        source = serving.draft or ways[serving.speculate]
        log(f"speculation: drafts of up to {llm.batching.speculation.most} tokens, by {source}")
    frontends = default_frontends(llm.engine.device.type) if http.frontends is None else http.frontends
    paths = ("completions", "chat/completions") if template else ("completions",)
    if not frontends:
        log_addresses(url(listener, http.tls), paths, log)
        app = create_app(llm, api, template, load_tokenizer_config(bundle))
        if api.access_log:
            log_access()
        close = llm.batching.close
        run_server(http_server(app, keep_alive=http.keep_alive, close=close, tls=http.tls), listener)
        return
    log(f"HTTP and text in processes of their own: {frontends}")
    vocab_size = llm.engine.config.vocab_size
    config = FrontEndConfig(
        options=api,
        bundle=str(bundle),
        limits=llm.limits,
        vocab_size=vocab_size,
        keep_alive=http.keep_alive,
        tls=http.tls,
    )
    address = url(listener, http.tls)
    listeners = [listener, *(listen_too(listener) for _ in range(frontends - 1))]
    FrontEnds(llm.batching, listeners, config).run(lambda: log_addresses(address, paths, log))


def log_capacity(name: str, c: Capacity, log: Callable[[str], None]) -> None:
    log(f"{name}: {c.slots} sequences at once, {c.pages} KV pages of {c.page_size} tokens, {c.max_seq_len} a sequence")
    if c.whole_chunks:
        log("deterministic: a request's bits do not depend on the others")
    if c.prefix_rows:
        size = f"{c.prefix_rows * c.row_bytes / 2**20:.0f} MiB"
        log(f"prefix cache: {c.prefix_rows} prefixes ({size}), {c.host_bytes / 2**20:.0f} MiB of host memory")


def log_addresses(address: str, paths: Sequence[str], log: Callable[[str], None]) -> None:
    for path in paths:
        log(f"POST {address}/v1/{path}")
    log(f"GET  {address}/v1/models  /health  /metrics")
    log(f"a page to try it from: {address}/")
