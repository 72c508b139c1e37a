"""`serve`: what it prints, which processes it starts, and the sockets and limits under them."""

import os
import resource
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from helpers.serving import async_llm

from jet_export.bundle.manifest import Manifest
from jet_export.runtime import async_llm as runtime
from jet_export.runtime.capacity import Serving
from jet_export.server.openai import http, serve, supervisor
from jet_export.utils.errors import JetExportError


def test_the_default_number_of_front_ends(monkeypatch) -> None:
    for cores, expected in ((1, 1), (4, 1), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert (serve.default_frontends("cpu"), serve.default_frontends("cuda")) == (0, expected)


@pytest.mark.parametrize(("frontends", "listeners"), [(None, 1), (0, 1), (3, 3)])
def test_what_is_started_and_said(tmp_path: Path, monkeypatch, frontends, listeners) -> None:
    """The engine and what serves are stand-ins."""
    started: list[socket.socket] = []
    said: list[str] = []

    def run(self, on_ready) -> None:
        started.extend(self.listeners)
        assert self.config.keep_alive == 5 and self.config.bundle == str(tmp_path)
        on_ready()

    monkeypatch.setattr(runtime, "AsyncLLM", lambda bundle, serving: async_llm())
    monkeypatch.setattr(Manifest, "load", lambda bundle: SimpleNamespace(model={"name": "mini"}))
    monkeypatch.setattr(supervisor.FrontEnds, "run", run)
    monkeypatch.setattr(serve, "run_server", lambda server, listener: started.append(listener))
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    (tmp_path / "chat_template.jinja").write_text("x")
    options = serve.HttpOptions(port=0, keep_alive=5, frontends=frontends)
    serve.serve(tmp_path, options, Serving(), said.append)
    address = http.url(started[0])
    assert [http.url(s) for s in started] == [address] * listeners
    assert said[-4:] == [
        f"POST {address}/v1/completions",
        f"POST {address}/v1/chat/completions",
        f"GET  {address}/v1/models  /health  /metrics",
        f"a page to try it from: {address}/",
    ]
    assert ("HTTP and text in processes of their own: 3" in said) == (frontends == 3)
    for listener in started:
        listener.close()


def test_a_port_that_another_server_has_is_refused() -> None:
    with http.listen("127.0.0.1", 0) as first:
        with pytest.raises(JetExportError, match="Choose another address or port"):
            http.listen("127.0.0.1", first.getsockname()[1])
        with http.listen_too(first) as second:
            assert second.getsockname() == first.getsockname()


@pytest.mark.parametrize(
    ("limits", "raised", "warned"),
    [((1024, 20_000), 20_000, False), ((1024, resource.RLIM_INFINITY), 65536, False), ((256, 1024), 1024, True)],
)
def test_the_limit_of_open_files(monkeypatch, limits, raised, warned) -> None:
    said: list[str] = []
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: made.append(limit))
    http.raise_file_limit(said.append)
    assert made == [(raised, limits[1])] and bool(said) == warned
