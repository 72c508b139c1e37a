"""`jet-export serve` around a tritonserver, with a stand-in that fails in the ways the real one can."""

import os
import signal
import sys
import threading
import time

import pytest

pytest.importorskip("pydantic")

from helpers.triton_serving import alive

from jet_export.server.triton import tritonserver
from jet_export.server.triton.installation import Installation
from jet_export.server.triton.repository import Repository
from jet_export.server.triton.tritonserver import Ports, run_triton
from jet_export.utils.errors import JetExportError

STAND_IN = '''
import http.server, os, signal, subprocess, sys, time
options = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if "=" in a)
control = os.environ["JET_EXPORT_CONTROL"]
def instance(state, pid=os.getpid()):
    open(f"{control}/mini_0.{state}", "w").write(str(pid))
def ends(*_):
    os.rename(f"{control}/mini_0.busy", f"{control}/mini_0.idle")
mode = os.environ["STAND_IN"]
if mode == "fails":
    print("""E1123 10:00:00.1 12 model_lifecycle.cc:654] "failed to load 'mini' version 1: Internal: """
          """TritonModelException: too many slots\\\\nAsk for fewer.\\\\n\\\\nAt:\\\\n  /x/model.py(28)\\\\n" """)
    sys.exit(1)
child = subprocess.Popen(["sleep", "100"])  # as a backend's process
open(os.environ["CHILD"], "w").write(str(child.pid))
if mode == "crashes":
    gone = subprocess.Popen(["true"])
    time.sleep(0.2)  # a zombie from here on
    instance("busy", gone.pid)
else:
    instance("busy")
signal.signal(signal.SIGTERM, ends if mode == "lingers" else lambda *_: sys.exit(3))
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", int(options["http-port"])), Ready)
if mode == "dies":
    server.handle_request()
    os.kill(os.getpid(), 9)
server.serve_forever()
'''


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(mode, seconds until SIGTERM) -> the lines it logged. Afterwards no process of the server is alive."""
    binary = tmp_path / "tritonserver"
    binary.write_text(f"#!{sys.executable}\n{STAND_IN}")
    binary.chmod(0o755)
    child = tmp_path / "child"
    monkeypatch.setenv("CHILD", str(child))
    monkeypatch.setattr(tritonserver, "find_server", lambda scratch: Installation(binary=binary, backends=tmp_path))
    monkeypatch.setattr(tritonserver, "SETTLE", 0.3)
    monkeypatch.setattr(Repository, "files", lambda self: ("mini", {"config.pbtxt": "", "1/model.py": ""}))

    def run(mode: str, seconds: float | None = None) -> list[str]:
        monkeypatch.setenv("STAND_IN", mode)
        lines: list[str] = []
        timer = threading.Timer(seconds or 0, os.kill, (os.getpid(), signal.SIGTERM))
        if seconds:
            timer.start()
        run_triton(Repository(tmp_path), "127.0.0.1", Ports(http=0, grpc=0, metrics=0), lines.append)
        return lines

    yield run
    if child.exists():
        time.sleep(0.1)
        assert not alive(int(child.read_text()))


def test_a_model_that_does_not_load_reports_the_reason(run) -> None:
    with pytest.raises(JetExportError, match=r"^tritonserver does not start: too many slots\nAsk for fewer.$"):
        run("fails")


def test_a_server_or_an_instance_that_dies_is_reported(run) -> None:
    with pytest.raises(JetExportError, match="tritonserver ended killed by signal 9"):
        run("dies")
    with pytest.raises(JetExportError, match="mini_0, an instance of the model, has died"):
        run("crashes")


def test_an_idle_server_that_does_not_exit_is_killed(run) -> None:
    start = time.monotonic()
    assert len(run("lingers", 2.0)) == 4
    assert time.monotonic() - start < 10


def test_a_server_that_fails_when_told_to_stop_is_reported(run) -> None:
    with pytest.raises(JetExportError, match="tritonserver ended with status 3"):
        run("waits", 2.0)
