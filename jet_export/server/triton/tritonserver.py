"""One run of Triton Inference Server as a program, from start to clean stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jet_export.server.triton.installation import Installation, find_server
from jet_export.server.triton.repository import Repository, write_repository
from jet_export.server.triton.tensors import CONTROL
from jet_export.utils.errors import JetExportError
from jet_export.utils.processes import signal_at_parents_end

GRACE = 10  # seconds that running requests have to finish after SIGTERM
MARGIN = 20  # seconds the server has to exit after they have been cancelled
SETTLE = 4  # seconds an idle server has to exit
LOADING = 600  # seconds that a model may take to load
LOAD_FAILURE = re.compile(
    r"failed to load '.*?' version \d+: \w[\w ]*: (?:TritonModelException: )?(.*?)(?:\\n\\nAt:.*)?\"?$"
)


@dataclass(frozen=True, kw_only=True)
class Ports:
    """0 picks a free port."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def reserve(host: str, ports: Ports) -> Ports:
    """The ports, with free ones for 0. Raises JetExportError if one is taken or invalid."""
    taken: list[socket.socket] = []
    try:
        for name, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
            try:
                family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
                taken.append(socket.create_server((host, port), family=family))
            except (OSError, OverflowError) as e:
                raise JetExportError(
                    f"--host {host} --{name}-port {port}: {e}.", "Choose another; 0 picks a free one."
                ) from None
        http, grpc, metrics = (s.getsockname()[1] for s in taken)
        return Ports(http=http, grpc=grpc, metrics=metrics)
    finally:
        for s in taken:
            s.close()


def run_triton(
    repository: Repository, host: str, ports: Ports, log: Callable[[str], None], grace: float = GRACE
) -> None:
    """Run Triton Inference Server on the model until SIGTERM or SIGINT, then let running requests finish.

    After `grace` seconds those that still run are cancelled; each is answered with the reason. Raises JetExportError if
    no server is installed, a port is taken, the model does not load, or the server exits by itself.
    """
    with tempfile.TemporaryDirectory(prefix="jet-export-triton-") as scratch:
        model = write_repository(Path(scratch) / "models", repository)
        server = find_server(Path(scratch))
        ports = reserve(host, ports)
        run = Run(server, Path(scratch), host, ports, grace)
        before = {s: signal.signal(s, run.stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            run.start()
            if run.wait_until_ready():
                show_endpoints(model.name, host, ports, log)
            run.wait()
        finally:
            run.clean_up()
            for s, handler in before.items():
                signal.signal(s, handler)


def show_endpoints(name: str, host: str, ports: Ports, log: Callable[[str], None]) -> None:
    host = f"[{host}]" if ":" in host else host
    log(f"POST http://{host}:{ports.http}/v2/models/{name}/generate  /generate_stream")
    log(f"GET  http://{host}:{ports.http}/v2/models/{name}/config  /v2/health/ready")
    log(f"gRPC {host}:{ports.grpc}  model {name}, ModelStreamInfer")
    log(f"GET  http://{host}:{ports.metrics}/metrics")


class Run:
    """One tritonserver process. Its warnings and errors are printed, and its output is kept to explain a failure."""

    def __init__(self, server: Installation, scratch: Path, host: str, ports: Ports, grace: float) -> None:
        self.server, self.host, self.ports, self.grace = server, host, ports, grace
        self.control = scratch / "control"
        self.control.mkdir()
        self.models = scratch / "models"
        self.region = f"jet-export-{os.getpid()}-"  # prefix of the backend's shared memory
        self.lines: deque[str] = deque(maxlen=200)
        self.ready = self.stopped = False
        self.timers: list[threading.Timer] = []
        self.process: subprocess.Popen[str]

    def command(self) -> list[str]:
        options: dict[str, object] = {
            "model-repository": self.models,
            "backend-directory": self.server.backends,
            "http-address": self.host,
            "http-port": self.ports.http,
            "grpc-address": self.host,
            "grpc-port": self.ports.grpc,
            "metrics-address": self.host,
            "metrics-port": self.ports.metrics,
            "disable-auto-complete-config": None,
            "exit-timeout-secs": int(self.grace) + MARGIN,
            "log-info": "false",
            "rate-limit": "execution_count",  # of the idle instances, the one that has run the fewest requests
        }
        words = [f"--{k}" if v is None else f"--{k}={v}" for k, v in options.items()]
        backend = {"shm-region-prefix-name": self.region, "stub-timeout-seconds": LOADING}
        words += [f"--backend-config=python,{k}={v}" for k, v in backend.items()]
        return [str(self.server.binary), *words]

    def start(self) -> None:
        environment = {**self.server.environment(), CONTROL: str(self.control)}
        self.process = subprocess.Popen(
            self.command(),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if self.ready and not self.stopped and re.match(r"[WE]\d{4} ", line):
                print(line, end="", file=sys.stderr, flush=True)

    def wait_until_ready(self) -> bool:
        """False if it was told to stop in the meantime. Raises JetExportError if the model does not load."""
        url = f"http://{'[' + self.host + ']' if ':' in self.host else self.host}:{self.ports.http}/v2/health/ready"
        end = time.monotonic() + LOADING
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self.process.poll() is None and not self.stopped:
            try:
                with opener.open(url, timeout=5):
                    self.ready = True
                    return True
            except (urllib.error.URLError, OSError):
                if time.monotonic() > end:
                    raise JetExportError(f"tritonserver was not ready after {LOADING} s.") from None
                time.sleep(0.05)
        if not self.stopped:
            self.reader.join(1)
            raise JetExportError(f"tritonserver does not start: {self._reason()}")
        return False

    def _reason(self) -> str:
        """Why the server failed: the model's own message if there is one, else the server's last errors."""
        for line in self.lines:
            found = LOAD_FAILURE.search(line)
            if found:
                return found[1].replace("\\n", "\n")
        errors = [line for line in self.lines if re.match(r"E\d{4} |error", line)]
        return " | ".join((errors or list(self.lines))[-3:]) or f"status {self.process.returncode}"

    def stop(self, *_: object) -> None:
        """Signal handler: no new requests; running ones have `grace` seconds."""
        if self.stopped:
            return
        self.stopped = True
        if hasattr(self, "process"):
            (self.control / "draining").touch()
            self.process.terminate()
            self._later(self.grace, (self.control / "stop").touch)
            self._later(self.grace + MARGIN + 5, self.process.kill)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()
        self.timers.append(timer)

    def wait(self) -> None:
        """Wait for the server to exit. Raises JetExportError if it was not told to, fails, or an instance dies."""
        idle_since: float | None = None
        while self.process.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            busy = list(self.control.glob("*.busy"))
            idle_since = (idle_since or now) if self.stopped and not busy else None
            if idle_since is not None and now > idle_since + SETTLE:
                # Every request is answered. Triton still waits for clients that keep their connections open, and
                # forever if a gRPC stream was cancelled after a response: its frontend never releases the model then.
                self.process.kill()
                self.process.wait()
                return
            dead = next((p for p in busy if not _is_alive(p)), None)
            if dead is not None and self.process.poll() is None:
                raise JetExportError(f"{dead.stem}, an instance of the model, has died.", "Start the server again.")
        self.reader.join(1)
        status = self.process.returncode
        if not self.stopped or status != 0:
            how = f"killed by signal {-status}" if status < 0 else f"with status {status}"
            raise JetExportError(f"tritonserver ended {how}: {self._reason()}")

    def clean_up(self) -> None:
        """Leave no process and no shared memory behind, however the run ended."""
        for timer in self.timers:
            timer.cancel()
        if hasattr(self, "process"):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the server and its backend's processes
            self.process.wait()
        for path in Path("/dev/shm").glob(f"{self.region}*"):
            path.unlink(missing_ok=True)


def _is_alive(busy: Path) -> bool:
    """Whether the process whose id is in the file is alive. An instance that removes its file is idle, not dead."""
    try:
        pid = busy.read_text()
    except FileNotFoundError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return not pid  # still being written
    return state not in "ZX"


def _end_with_parent() -> None:
    """Runs in the server's process, which then gets SIGTERM if jet-export is killed."""
    signal_at_parents_end(signal.SIGTERM)
