"""`jet-export serve --openai --replicas`: a fleet on a Ray cluster until SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jet_export.server.openai.serve import log_addresses
from jet_export.server.ray.config import FleetConfig
from jet_export.utils.errors import JetExportError
from jet_export.utils.progress import Progress


def serve_fleet(config: FleetConfig, *, host: str, port: int, address: str | None, log: Callable[[str], None]) -> None:
    """Serve on the cluster at `address`, or on one that is started on this machine and ends with this process.

    Raises JetExportError if Ray is not installed or the cluster cannot be reached."""
    try:
        import ray
        from ray import serve

        from jet_export.server.ray.app import APP, application
    except ImportError as e:
        raise JetExportError(f"--replicas needs {e.name}.", "Install it: pip install 'jet-export[ray]'") from None
    config = replace(config, bundle=str(Path(config.bundle).resolve()))
    app = application(config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise JetExportError(f"--ray {address}: no cluster there ({e}).", "Start one: ray start --head") from None
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
        with Progress(log).stage(f"start {config.replicas or 'at least ' + str(config.least)} replicas", lines=False):
            serve.run(app, name=APP, route_prefix="/", blocking=False)
        log_addresses(f"http://{host}:{port}", ("completions", "chat/completions"), log)
        stop.wait()
        log("stopping: requests that run have their whole answer")
        serve.delete(APP)
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()
