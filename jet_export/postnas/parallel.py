"""Jobs side by side: processes of this machine, each with a session of its own, that take jobs until none is left.

A job's result is the file that it writes, so a job that was done before is not done again. Two pipes join a process to
the caller: one for jobs, lines and their ends, the other for a stop; when the second breaks, the caller is gone, and
the process ends.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from jet_export.postnas.session import Job, Session, Stopped
from jet_export.training.distributed import processes
from jet_export.training.stop import Stop
from jet_export.utils.errors import JetExportError

POLL = 0.2  # seconds between looks for a stop
PATIENCE = 10.0  # seconds for an idle process to end


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    jobs: Connection
    stop: Connection


class Workers:
    """Up to `number` processes, begun when they are needed; they keep what they have read until `close`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._workers: list[_Worker] = []

    def run(self, session: Session, jobs: Sequence[Job]) -> None:
        """In any order. Raises Stopped after a stop that was asked for, which ends the jobs with checkpoints, or which
        a job raised itself: then those that have begun end as well. Raises what a job raised, or JetExportError for a
        process that died, once the others have stopped."""
        while len(self._workers) < min(self.number, len(jobs)):
            self._workers.append(_begin(len(self._workers), self.number, session.device))
        try:
            stopped, error = self._run(session, deque(jobs))
        except BaseException:
            self.close(kill=True)
            raise
        if error or session.stop.asked:
            self.close()  # what they are told to stop by stays told
        if error and not session.stop.asked:
            raise error
        if stopped or error:
            raise Stopped

    def _run(self, session: Session, waiting: deque[Job]) -> tuple[bool, Exception | None]:
        """Whether a job was stopped, and the first error."""
        stopped, told, error = False, False, None
        idle, busy = deque(range(len(self._workers))), dict[Connection, int]()
        while busy or waiting:
            if stopped or error or session.stop.asked:
                stopped = stopped or bool(waiting)
                waiting.clear()
            if (error or session.stop.asked) and not told:
                told = True
                for number in busy.values():
                    _send(self._workers[number].stop, True)
            while waiting and idle:
                number = idle.popleft()
                _send(self._workers[number].jobs, (session, waiting.popleft()))
                busy[self._workers[number].jobs] = number
            for pipe in wait(list(busy), POLL):
                assert isinstance(pipe, Connection)
                said, value = self._hear(pipe, busy[pipe])
                if said == "line":
                    session.say(f"[{busy[pipe]}] {value}")
                    continue
                idle.append(busy.pop(pipe))
                stopped = stopped or said == "stopped"
                error = error or (value if said == "error" else None)
        return stopped, error

    def close(self, kill: bool = False) -> None:
        """End the processes, which are idle unless `kill`."""
        for worker in self._workers:
            worker.jobs.close()
            if kill:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(PATIENCE)
            worker.process.kill()
            worker.process.join()
            worker.stop.close()
        self._workers.clear()

    def _hear(self, pipe: Connection, number: int) -> tuple[str, Any]:
        try:
            heard: tuple[str, Any] = pipe.recv()
        except (EOFError, OSError):
            process = self._workers[number].process
            process.join()
            return "error", JetExportError(
                f"--parallel {self.number}: process [{number}] died (status {process.exitcode}).",
                "What is done stays: go on by --resume; with a smaller --parallel, if memory ran out.",
            )
        return heard


def _send(pipe: Connection, value: object) -> None:
    """To a process that may have died, which `Workers` notices when it listens."""
    with suppress(OSError):
        pipe.send(value)


def _begin(number: int, count: int, device: str) -> _Worker:
    context = multiprocessing.get_context("spawn")
    (jobs, its_jobs), (its_stop, stop) = context.Pipe(), context.Pipe(duplex=False)
    arguments = (number, device, torch.get_num_threads(), its_jobs, its_stop)
    process = context.Process(target=_work, args=arguments, name=f"postnas {number} of {count}", daemon=True)
    process.start()
    its_jobs.close()
    its_stop.close()
    return _Worker(process, jobs, stop)


def _work(number: int, device: str, threads: int, jobs: Connection, stops: Connection) -> None:
    """The process: jobs until the caller ends it. Signals are the caller's matter."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(threads)  # as many as there: the same results
    stop = Stop()
    threading.Thread(target=_listen, args=(stops, stop), daemon=True).start()
    gpus = torch.cuda.device_count()
    own: Session | None = None
    with processes(device, number % gpus if gpus else 0) as group:
        while True:
            try:
                try:
                    session, job = jobs.recv()
                except EOFError:
                    return
                if own is None:
                    own = session
                    own.group, own.stop, own.bars = group, stop, False
                    own.say = lambda line: jobs.send(("line", line))
                vars(own).update(vars(session))  # what it has read stays
                job.work(own)
                jobs.send(("done", None))
            except Stopped:
                jobs.send(("stopped", None))
            except Exception as e:
                jobs.send(("error", _portable(e)))


def _listen(stops: Connection, stop: Stop) -> None:
    while True:
        try:
            stop.asked = stops.recv()
        except (EOFError, OSError):
            os._exit(1)


def _portable(e: Exception) -> Exception:
    """An exception that can be sent: itself, or one with its text and where it came from."""
    if isinstance(e, JetExportError):
        return e
    traceback.print_exception(e)
    try:
        same: Exception = pickle.loads(pickle.dumps(e))
    except Exception:
        return RuntimeError(f"{type(e).__name__}: {e}")
    return same
