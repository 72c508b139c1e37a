"""Compiles one package of a bundle in a process of its own.

    python -m jet_export.backends.inductor.compile_worker DIRECTORY MODE PARENT

DIRECTORY, a bundle that is being built, holds manifest.json and weights.safetensors; MODE.pt2 is put beside them.
Inductor is bound by Python, so packages compiled side by side take only as long as the slowest one. The process ends
when its parent, process PARENT, does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from jet_export.utils.errors import GPU_MEMORY, JetExportError, out_of_gpu_memory
from jet_export.utils.processes import end_with_parent

if TYPE_CHECKING:
    from jet_export.bundle.manifest import Manifest
    from jet_export.model.jet_nemotron import JetNemotronForCausalLM

GPU_BYTES = 2_000_000_000  # a process on top of 1.5 times the weights: CUDA's context, example inputs, autotuning
HOST_BYTES = 3_000_000_000  # a process and its compilers
LAST_LINES = 12  # shown of what a failed process printed


@dataclass(frozen=True, kw_only=True)
class CompileMemory:
    """Bytes that decide whether packages compile side by side."""

    device: str
    weights: int
    gpu_free: int  # without this process's own model
    host_free: int

    def holds(self, processes: int) -> bool:
        """Whether so many processes fit at once. Never on a CPU, whose memory would hold the weights several times."""
        gpu, host = processes * (1.5 * self.weights + GPU_BYTES), processes * HOST_BYTES
        return self.device == "cuda" and gpu <= self.gpu_free and host <= self.host_free


def compile_mode(model: JetNemotronForCausalLM, manifest: Manifest, mode: str, directory: Path) -> None:
    """Write MODE.pt2, with the manifest's dtypes and limits."""
    from jet_export.backends.inductor.package import compile_package, export_graph

    program = export_graph(model, mode, manifest.dtypes, manifest.limits, fused=manifest.dependent_launch)
    compile_package(program, directory / f"{mode}.pt2", dependent=manifest.dependent_launch)


def worker_command(directory: Path, mode: str) -> list[str]:
    return [sys.executable, "-m", "jet_export.backends.inductor.compile_worker", str(directory), mode, str(os.getpid())]


class _Process:
    """One compilation. Its output is kept, to be shown if it fails."""

    def __init__(self, directory: Path, mode: str, threads: int) -> None:
        self.mode, self.start = mode, time.monotonic()
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        self.process = subprocess.Popen(
            worker_command(directory, mode),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"TORCHINDUCTOR_COMPILE_THREADS": str(threads), **os.environ},
        )

    def failure(self) -> JetExportError | None:
        """The error of a process that has ended; None where it succeeded."""
        status = self.process.returncode
        if status == 0:
            return None
        how = f"exit status {status}" if status > 0 else f"its process dies of {signal.Signals(-status).name}"
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        if said := out_of_gpu_memory(text):
            return JetExportError(f"the {self.mode} package does not compile: {said}", GPU_MEMORY)
        lines = [line for line in text.splitlines() if line.strip()]
        return JetExportError("\n  ".join([f"the {self.mode} package does not compile ({how}).", *lines[-LAST_LINES:]]))

    def end(self) -> None:
        """Kill the process, if it still runs, and the compilers that it started."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()


def compile_side_by_side(directory: Path, modes: Sequence[str], emit: Callable[[str], None]) -> None:
    """Compile all modes at once. Raises JetExportError with the last lines of the first that fails, and ends the
    others."""
    running: list[_Process] = []
    threads = max(2, (os.cpu_count() or 2) // len(modes))  # Inductor's own default is all cores, for each process
    try:
        for mode in modes:
            running.append(_Process(directory, mode, threads))
        waiting = list(running)
        while waiting:
            for p in [p for p in waiting if p.process.poll() is not None]:
                if failure := p.failure():
                    raise failure
                emit(f"    {p.mode}: {time.monotonic() - p.start:.1f} s")
                waiting.remove(p)
            time.sleep(0.1 if waiting else 0.0)
    finally:
        for p in running:
            p.end()


def main(directory: Path, mode: str, parent: int) -> None:
    end_with_parent(parent)
    from jet_export.backends.eager import load_eager
    from jet_export.bundle.manifest import Manifest

    manifest = Manifest.load(directory)
    try:
        compile_mode(load_eager(directory, manifest).model, manifest, mode, directory)
    except JetExportError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
