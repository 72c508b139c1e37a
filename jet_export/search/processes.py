"""The processes that build and measure cells (worker.py), and what became of them. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from jet_export.utils.errors import JetExportError

TASK_TIMEOUT = 3600  # seconds of one build or measurement
WORKER = ("-m", "jet_export.search.worker")


class ProcessFailed(JetExportError):
    """`answer`: the process's own, {"error": ...} and whatever else it said; empty if it died."""

    def __init__(self, message: str, answer: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = answer or {}


@dataclass
class WorkerProcess:
    """A running `worker measure` (or describe): takes a task as a line of JSON, and answers each with a line."""

    process: subprocess.Popen[str]
    errors: IO[str]  # its standard error

    @classmethod
    def start(
        cls, work: str = "measure", worker: tuple[str, ...] = WORKER, environment: Mapping[str, str] | None = None
    ) -> WorkerProcess:
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by `end`)
        command, pipe = [sys.executable, *worker, work], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)
        return cls(process, errors)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def answer(self, task: dict[str, Any], seconds: float = TASK_TIMEOUT) -> dict[str, Any]:
        """What the process says to a task. Raises ProcessFailed; the process is then of no further use."""
        line = self.ask(task, seconds)
        if line is None:
            raise ProcessFailed(f"took over {seconds} s.")
        answer = json.loads(line or "null")
        if answer is None or "error" in answer:
            code = 1 if line else self.process.wait()
            raise ProcessFailed(f"failed: {failure_reason(code, line, self.stderr())}", answer)
        found: dict[str, Any] = answer
        return found

    def ask(self, task: dict[str, Any], seconds: float) -> str | None:
        """The answer's line; "" if the process died, None if it was killed for taking longer than `seconds`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            self.process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return None if timed_out.is_set() else line

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            if file is not None:
                with suppress(BrokenPipeError):
                    file.close()


@dataclass
class Builds:
    """The builds that run, each a process of its own."""

    worker: tuple[str, ...] = WORKER
    running: set[subprocess.Popen[str]] = field(default_factory=set)

    def run(self, task: dict[str, Any], threads: int, environment: Mapping[str, str] | None = None) -> None:
        """A build with so many of Inductor's threads, whose default is one a core. Raises ProcessFailed."""
        command, pipe = [sys.executable, *self.worker, "build"], subprocess.PIPE
        env = {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), **(os.environ if environment is None else environment)}
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env) as process:
            self.running.add(process)
            try:
                out, err = process.communicate(json.dumps(task), timeout=TASK_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise ProcessFailed(f"took over {TASK_TIMEOUT} s.") from None
            except BaseException:
                process.kill()
                raise
            finally:
                self.running.discard(process)
        if process.returncode:
            raise ProcessFailed(f"failed: {failure_reason(process.returncode, out, err)}", last_answer(out))

    def stop(self) -> None:
        for process in list(self.running):
            process.kill()


def last_answer(out: str) -> dict[str, Any]:
    """The last line that is an answer with an error; empty if there is none."""
    for line in reversed(out.splitlines()):
        with suppress(ValueError, KeyError, TypeError):
            answer: dict[str, Any] = json.loads(line)
            if str(answer["error"]):
                return answer
    return {}


def failure_reason(returncode: int, out: str, err: str) -> str:
    """The error that a worker answered with, or how it died."""
    if answer := last_answer(out):
        return str(answer["error"])
    if returncode < 0:
        return f"its process died of {signal.Signals(-returncode).name}"
    return (err.strip().splitlines() or [f"exit status {returncode}"])[-1]
