"""A real Triton Inference Server as `jet-export serve BUNDLE` starts it, and requests to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import pytest

from jet_export.server.triton.installation import find_server
from jet_export.utils.errors import JetExportError

TYPES = {
    "text_input": ("BYTES", object),
    "sampling_parameters": ("BYTES", object),
    "stop_words": ("BYTES", object),
    "stream": ("BOOL", bool),
    "ignore_eos": ("BOOL", bool),
    "exclude_input_in_output": ("BOOL", bool),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
}


def skip_without_server() -> None:
    """Skips the module where no tritonserver can run, with the reason."""
    for module in ("tritonclient.grpc.aio", "tritonclient.http", "pydantic"):
        pytest.importorskip(module)
    try:
        with TemporaryDirectory() as scratch:
            find_server(Path(scratch))
    except JetExportError as e:
        pytest.skip(str(e), allow_module_level=True)


@dataclass(kw_only=True)
class Server:
    program: subprocess.Popen[str]
    model: str
    http: int
    grpc: int
    metrics: int
    server_pid: int
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}/v2/models/{self.model}"

    def generate(self, **body) -> httpx.Response:
        return self.client.post(f"{self.url}/generate", json=body)

    def values(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels."""
        text = self.client.get(f"http://127.0.0.1:{self.metrics}/metrics").text
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in text.splitlines() if x and x[0] != "#")}

    def total(self, name: str, *labels: str) -> float:
        """The sum of all samples of this name with these labels."""
        return sum(
            v for k, v in self.values().items() if k.split("{")[0] == name and all(label in k for label in labels)
        )

    def settled(self, name: str, *labels: str, seconds: float = 3) -> float:
        """`total` once it has not changed for so long: Triton's /metrics follow the engine's about once a second."""
        value, since = self.total(name, *labels), time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(0.2)
            now = self.total(name, *labels)
            if now != value:
                value, since = now, time.monotonic()
        return value

    def wait_for(self, name: str, value: float, *labels: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while self.total(name, *labels) != value:
            assert time.monotonic() < end, (name, labels, self.total(name, *labels), value)
            time.sleep(0.1)

    def wait_until(self, holds: Callable[[dict[str, float]], bool], seconds: float = 30) -> None:
        """`holds` is given all of `values`."""
        end = time.monotonic() + seconds
        while not holds(values := self.values()):
            assert time.monotonic() < end, values
            time.sleep(0.1)

    def memory(self) -> int:
        """Bytes of physical memory of the server and the processes of its backend."""
        return sum(_resident(pid) for pid in [self.server_pid, *children(self.server_pid)])

    def terminate(self) -> tuple[int, str]:
        """Send SIGTERM; returns (exit status, standard error)."""
        self.program.send_signal(signal.SIGTERM)
        return self.finish()

    def finish(self) -> tuple[int, str]:
        _, err = self.program.communicate(timeout=60)
        return self.program.returncode, err


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


@contextmanager
def serving(bundle: Path, *options: str, program: tuple[str, ...] = ("-m", "jet_export.cli.app", "serve")):
    """`jet-export serve BUNDLE OPTIONS` on free ports, ready."""
    ports = [] if any("port" in o for o in options) else ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [sys.executable, *program, str(bundle), *(ports if program[1] == "jet_export.cli.app" else []), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        found = re.findall(r"127\.0\.0\.1:(\d+)", "".join(lines))
        assert len(found) == 4, process.communicate()
        name = re.search(r"/v2/models/(\S+)/generate", lines[0])
        assert name is not None
        yield Server(
            program=process,
            model=name[1],
            http=int(found[0]),
            grpc=int(found[2]),
            metrics=int(found[3]),
            server_pid=children(process.pid)[0],
        )
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def tensors(kind, **values) -> list:
    """Inputs for tritonclient; `kind` is its InferInput."""
    inputs = []
    for name, value in values.items():
        datatype, dtype = TYPES.get(name, ("INT32", np.int32))
        array = np.array(value if isinstance(value, list) else [value], dtype)
        inputs.append(kind(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def main() -> None:
    """BUNDLE INSTANCES GRACE: a server with a grace period of GRACE seconds after SIGTERM."""
    from jet_export.server.triton.repository import Repository
    from jet_export.server.triton.tritonserver import Ports, run_triton

    bundle, instances, grace = sys.argv[1:]
    run_triton(
        Repository(Path(bundle), instances=int(instances)),
        "127.0.0.1",
        Ports(http=0, grpc=0, metrics=0),
        lambda line: print(line, flush=True),
        grace=float(grace),
    )


if __name__ == "__main__":
    main()
