"""What a node of a Ray cluster does for a search: builds, and measurements on one GPU. Imports no torch.

Each is a generator, of which Ray gives the driver one object after the other: first {"node": its id}, then what it has
found, or chunks of the bundle, or {"error": ...}. Nothing is left on the node.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jet_export.search.locks import building, measuring
from jet_export.search.processes import Builds, ProcessFailed, WorkerProcess

CHUNK = 64 << 20  # bytes of a bundle that travel as one object
THREADS = "OMP_NUM_THREADS"

Task = dict[str, Any]
Bytes = npt.NDArray[np.uint8]


def describe(task: Task) -> Iterator[Task]:
    """{"host": ...}"""
    yield started()
    process = WorkerProcess.start("describe", tuple(task["worker"]), environment(task))
    try:
        yield process.answer({"device": task["device"], "parent": os.getpid()})
    except ProcessFailed as e:
        yield failure("describe", e)
    finally:
        process.end()


def build(task: Task) -> Iterator[Task | Bytes]:
    """The bundle, as chunks of a tar file."""
    yield started()
    with tempfile.TemporaryDirectory(prefix="jet-export-") as directory:
        bundle = Path(directory) / "bundle"
        try:
            with building():
                local = {**task, "bundle": str(bundle), "parent": os.getpid()}
                Builds(tuple(task["worker"])).run(local, int(task["threads"]), environment(task))
        except ProcessFailed as e:
            yield failure("build", e)
            return
        yield from packed(bundle, Path(directory) / "bundle.tar")


def measure(task: Task, *chunks: Bytes) -> Iterator[Task]:
    """{"entries": [...]} of all cases, measured on the GPU that Ray has given this process, if any."""
    yield started()
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") if task["device"] == "cuda" else ""
    with tempfile.TemporaryDirectory(prefix="jet-export-") as directory:
        bundle = Path(directory) / "bundle"
        unpack(chunks, bundle)
        process = WorkerProcess.start("measure", tuple(task["worker"]), environment(task))
        try:
            with measuring(gpu=int(gpu) if gpu.isdecimal() else None):
                yield process.answer({**task, "bundle": str(bundle), "database": None, "parent": os.getpid()})
        except ProcessFailed as e:
            yield failure("measure", e)
        finally:
            process.end()


def started() -> Task:
    import ray

    return {"node": ray.get_runtime_context().get_node_id()}


def failure(what: str, e: ProcessFailed) -> Task:
    return {"error": f"{what} {e}", "other_machine": bool(e.answer.get("other_machine"))}


def environment(task: Task) -> dict[str, str]:
    """This process's, with the driver's number of threads: Ray sets one of its own for what a task is given."""
    inherited = {k: v for k, v in os.environ.items() if k != THREADS}
    return inherited | ({} if task["omp_threads"] is None else {THREADS: task["omp_threads"]})


def packed(directory: Path, scratch: Path) -> Iterator[Bytes]:
    """A directory's files as chunks of a tar file, which is written to `scratch` first."""
    with tarfile.open(scratch, "w") as tar:
        tar.add(directory, arcname=".")
    with scratch.open("rb") as f:
        while chunk := f.read(CHUNK):
            yield np.frombuffer(chunk, np.uint8)


class Joined(io.RawIOBase):
    """Chunks, read as one file."""

    def __init__(self, chunks: Iterator[Bytes]) -> None:
        self.chunks: Iterator[Any] = chunks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not len(self.rest):
            self.rest = memoryview(next(self.chunks, b"")).cast("B")
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


def unpack(chunks: Any, directory: Path) -> None:
    """What `packed` has made of a directory."""
    with tarfile.open(fileobj=io.BufferedReader(Joined(iter(chunks))), mode="r|") as tar:
        tar.extractall(directory, filter="data")
