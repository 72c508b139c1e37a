"""`eval` and `serve`, killed at every stage that they name: results are what was there before, or new and whole; of a
server no process stays, and another one starts on the same port."""

import json
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("fastapi")

from helpers.crashes import files, killed_at_every_change, say
from helpers.eager_tiny import tiny_llm, write_bundle
from helpers.serving import answers, async_llm, wait_until
from helpers.triton_serving import alive

from jet_export.bundle.manifest import Manifest
from jet_export.cli import evaluate
from jet_export.evaluation import run, selection
from jet_export.runtime import async_llm as runtime
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.capacity import Serving
from jet_export.server.openai import http, serve

SERVER = "JET_EXPORT_TESTED_SERVER"  # in the environment of a server's processes, its id


def test_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of its stages, and changes of its files."""
    manager, llm = selection._manager, tiny_llm()
    monkeypatch.setattr(selection, "_manager", lambda dirs, settings, defaults: manager(dirs, settings, defaults=False))
    monkeypatch.setattr(run, "LLM", lambda directory, deterministic: llm)
    monkeypatch.setattr("jet_export.cli.evaluate.typer.echo", say)
    bundle, out = write_bundle(tmp_path / "jet-tiny"), tmp_path / "out"
    out.mkdir()
    report, samples = out / "eval.json", out / "samples.jsonl"

    def begin() -> None:
        for file in (report, samples):
            file.write_text("old")

    def evaluated() -> None:
        evaluate.evaluate(bundle, "recall", limit=1, lengths="64", json_file=report, samples=samples)

    evaluated()  # so that the children need not import what it takes
    begin()
    found = []
    for _ in killed_at_every_change(evaluated):
        found.append([file.read_text() != "old" for file in (report, samples)])
        assert not found[-1][0] or json.loads(report.read_text())["tasks"]["recall"]
        assert not found[-1][1] or [json.loads(line)["task"] for line in samples.read_text().splitlines()] == ["recall"]
        begin()
    assert [False, False] in found and [True, False] in found and len(found) > 5
    assert {name for name in files(out) if not name.startswith(".")} == {"eval.json", "samples.jsonl"}


@pytest.fixture
def port() -> int:
    with http.listen("127.0.0.1", 0) as listener:
        found: int = listener.getsockname()[1]
        return found


def start(directory: Path, port: int, stage: str) -> int:
    """The id of a server's process. It has one front end, and dies where it says `stage`, or after a minute."""

    def die_at(line: str) -> None:
        if stage and stage in line:
            os.kill(os.getpid(), signal.SIGKILL)

    if (pid := os.fork()) == 0:
        try:
            signal.alarm(60)
            os.environ[SERVER] = str(os.getpid())
            serve.serve(directory, serve.HttpOptions(port=port, frontends=1), Serving(), die_at)
        finally:
            os._exit(0)
    return pid


def front_ends(server: int) -> list[int]:
    """Its front ends that live."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if f"{SERVER}={server}\0".encode() in (process / "environ").read_bytes() and alive(int(process.name)):
                found.append(int(process.name))
    return found


def no_front_end(server: int) -> bool:
    return not front_ends(server)


def test_serve(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At lines of its log, then while it answers."""
    address, body = f"http://127.0.0.1:{port}", {"model": "mini", "prompt": "abc", "max_tokens": 300, "stream": True}

    def load(bundle: Path, serving: Serving) -> AsyncLLM:
        if stage == "load":
            os.kill(os.getpid(), signal.SIGKILL)
        return async_llm()

    monkeypatch.setattr(runtime, "AsyncLLM", load)
    monkeypatch.setattr(Manifest, "load", lambda bundle: SimpleNamespace(model={"name": "mini"}))
    for stage in ("load", "sequences at once", "HTTP and text in processes", "POST", ""):
        pid = start(tmp_path, port, stage)
        if not stage:
            wait_until(lambda: answers(address))
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ") and len(front_ends(pid)) == 1
                os.kill(pid, signal.SIGKILL)
                assert '"engine_error"' in [line for line in lines if line][-1]
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        wait_until(partial(no_front_end, pid))
