"""`jet-export serve --openai --replicas`: a fleet on a Ray cluster until SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from jet_export.server.openai.serve import HttpOptions, log_addresses
from jet_export.server.ray.config import FleetConfig
from jet_export.utils.errors import JetExportError
from jet_export.utils.progress import Progress

DIRECT = {  # a stream's messages are no objects of Ray's, and pass from one thread to another in no process
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


def serve_fleet(config: FleetConfig, http: HttpOptions, address: str | None, log: Callable[[str], None]) -> None:
    """Serve on the cluster at `address`, or on one that is started on this machine and ends with this process.

    Raises JetExportError if Ray is not installed or the cluster cannot be reached."""
    for setting, value in DIRECT.items():  # of the cluster that is started here; another has what it was started with
        os.environ.setdefault(setting, value)
    try:
        import ray
        from ray import serve

        from jet_export.server.ray.app import APP, application
    except ImportError as e:
        raise JetExportError(f"--replicas needs {e.name}.", "Install it: pip install 'jet-export[ray]'") from None
    if http.tls is not None:
        raise JetExportError(
            "serve --ssl-certfile: Ray Serve's proxy has no TLS.",
            "Put a load balancer with TLS in front of --replicas.",
        )
    if http.port == 0:
        raise JetExportError("serve --port 0: --replicas needs a port.", "For example: --port 8000")
    config = replace(config, bundle=str(Path(config.bundle).resolve()))
    app = application(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop = threading.Event()
    local = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise JetExportError(f"--ray {address}: no cluster there ({e}).", "Start one: ray start --head") from None
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray's own
        signal.signal(number, lambda *_: stop.set())
    try:
        if address is None:
            check_room(config, ray.cluster_resources())
        serve.start(
            http_options={"host": http.host, "port": http.port, "keep_alive_timeout_s": int(http.keep_alive)},
            logging_config={"log_level": "WARNING"},
        )
        with Progress(log).stage(f"start {config.replicas or 'at least ' + str(config.least)} replicas", lines=False):
            serve.run(app, name=APP, route_prefix="/", blocking=False)
        log_addresses(f"http://{http.host}:{http.port}", ("completions", "chat/completions"), log)
        stop.wait()
        log("stopping: requests that run have their whole answer")
        serve.delete(APP)
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


def check_room(config: FleetConfig, resources: Mapping[str, float]) -> None:
    """Raises JetExportError if this machine is too small for the replicas, for which Ray would wait."""
    replicas = config.least if config.replicas is None else config.replicas
    for name, each in (("GPU", config.gpus_each()), ("CPU", config.cpus)):
        have = resources.get(name, 0.0)
        if replicas * each > have:
            raise JetExportError(
                f"--replicas {replicas}: this machine has {have:g} {name}s, each replica takes {each:g}.",
                "Ask for fewer, or name a larger cluster: --ray ADDRESS.",
            )
