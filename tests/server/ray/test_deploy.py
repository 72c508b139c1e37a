"""`serve deploy` of the example on a Ray cluster of this machine: jet-tiny answers, and a changed config is deployed
without an end to that. Ray's dashboard, which takes the config, needs its time: `make cluster` runs this."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytest.importorskip("ray")

from helpers.bundles import tiny_bundle
from helpers.paths import ROOT, TESTS

pytestmark = pytest.mark.skipif("JET_CLUSTER" not in os.environ, reason="waits for Ray's dashboard: make cluster")
PATIENCE = 180.0  # seconds
BIN = Path(sys.executable).parent


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def until(true: Callable[[], bool], seen: Callable[[], str]) -> None:
    """Waits for it, as long as PATIENCE; `seen`: what to say otherwise."""
    end = time.monotonic() + PATIENCE
    while True:
        with suppress(httpx.TransportError):
            if true():
                return
        assert time.monotonic() < end, seen()
        time.sleep(0.5)


@contextmanager
def ray_head(log: Path) -> Iterator[str]:
    """`ray start --head`; gives the dashboard's address, which `serve deploy` asks for."""
    gcs, dashboard, agent, client = free_ports(4)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--port={gcs}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}"]
    environment = os.environ | {"PYTHONPATH": str(TESTS / "helpers/without_pandas"), "OMP_NUM_THREADS": "1"}
    address = f"http://127.0.0.1:{dashboard}"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        until(lambda: httpx.get(f"{address}/api/version").status_code == 200, log.read_text)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The example's, with jet-tiny, which takes 4 sequences at once, in place of jet-2b. Without Ray's token, which
    the dashboard asks for wherever a cluster has left one in the home directory."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "ray" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_ports(1)[0]}
    changed = {"bundle": str(tiny_bundle(tmp_path_factory)), "names": ["jet-tiny"], "serving": {"slots": 4}}
    config["applications"][0]["args"] |= changed
    return config


def test_the_example_is_deployed_and_then_with_another_name(config: dict[str, Any], tmp_path: Path) -> None:
    url, file = f"http://127.0.0.1:{config['http_options']['port']}", tmp_path / "serve.yaml"

    def serve(*words: str | Path) -> str:
        command = [BIN / "serve", *words, "--address", dashboard]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(*names: str) -> None:
        config["applications"][0]["args"]["names"] = list(names)
        file.write_text(yaml.safe_dump(config))
        serve("deploy", file)
        until(lambda: answer(names[-1]) == 200, lambda: serve("status"))

    def answer(model: str) -> int:
        body = {"model": model, "prompt": "def ", "max_tokens": 4}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).status_code

    with ray_head(tmp_path / "ray.log") as dashboard:
        deploy("jet-tiny")
        assert "RUNNING" in serve("status")
        deploy("jet-tiny", "new")
        assert answer("jet-tiny") == 200 and answer("other") == 404
