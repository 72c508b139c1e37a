"""Builds the plugin library: kernels to cubins in a process of its own, then g++; cached by the hash of all inputs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import triton

from jet_export.model.config import JetNemotronConfig
from jet_export.plugins.cases import Case, case_to_dict, model_cases
from jet_export.plugins.headers import cache_dir, find_headers, headers_for
from jet_export.utils.compiler import Compiler, find_compiler
from jet_export.utils.errors import JetExportError

PURPOSE = "the plugin library"
SOURCES = Path(__file__).parent / "src"
NAME = "libjet_plugins.so"
FLAGS = ("-std=c++17", "-O2", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,defs")
Emit = Callable[[str], None]


def library_for(
    config: JetNemotronConfig,
    sms: tuple[int, ...] | list[int],
    *,
    dtype: str = "bfloat16",
    state_dtype: str = "float32",
    cache_dtype: str = "bfloat16",
    state_interval: int = 1,
    rollback: int = 0,
    headers: str | Path | None = None,
    fetch: bool = False,
    emit: Emit = lambda line: None,
) -> Path:
    """The folder of a model's plugin library (its file: NAME), built unless the cache holds it.

    dtypes: torch's names, of the model, the recurrent state and the KV cache; `state_interval`, `rollback`: as a
    manifest's; `headers`, `fetch`: as --tensorrt-headers and --fetch-headers; `emit` is called with one line per step.
    Raises JetExportError as `build_library`."""
    include = headers_for(headers, fetch, emit)
    cases = model_cases(
        config,
        dtype=dtype,
        state_dtype=state_dtype,
        cache_dtype=cache_dtype,
        interval=state_interval,
        rollback=rollback,
    )
    return build_library(cases, list(sms), include, emit=emit)


def require_tools(headers: str | Path | None, fetch: bool) -> None:
    """Raises JetExportError if a library cannot be built: no headers and no download asked for, or no C++ compiler."""
    if not fetch:
        find_headers(headers)
    find_compiler(PURPOSE)


def build_library(
    cases: list[Case],
    sms: list[int],
    headers: str | Path | None = None,
    cache: Path | None = None,
    emit: Emit = lambda line: None,
) -> Path:
    """The folder with libjet_plugins.so, kernels.inc, kernels.json and the cubins, built unless the cache holds it.

    `sms`: the architectures to compile for: 80, 86, 89, 90, ... Raises JetExportError when headers or a compiler
    are missing or a kernel does not fit an SM."""
    include = find_headers(headers)
    compiler = find_compiler(PURPOSE)
    spec = json.dumps({"cases": [case_to_dict(case) for case in cases], "sms": sorted(set(sms))}, sort_keys=True)
    folder = (cache or cache_dir()) / f"plugins-{digest(spec, include, compiler)}"
    if (folder / NAME).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder, emit):
        if not (folder / NAME).is_file():
            build_into(folder, spec, compiler, include, emit)
    return folder


@contextmanager
def one_at_a_time(folder: Path, emit: Emit) -> Iterator[None]:
    """Other processes that need the same folder wait. The lock is released when the process that holds it ends."""
    path = folder.parent / f".{folder.name}.lock"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            emit("another process is building this plugin library: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def build_into(folder: Path, spec: str, compiler: Compiler, include: Path, emit: Emit) -> None:
    """Builds in a temporary folder beside `folder` and renames it: it appears complete or not at all."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".plugins-"))
    try:
        compile_kernels(spec, partial, emit)
        emit(f"{Path(compiler.words[0]).name}: {NAME}, with the TensorRT headers of {include}")
        compile_sources(compiler, include, partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was first, where files cannot be locked
            if not (folder / NAME).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest(spec: str, include: Path, compiler: Compiler) -> str:
    """Identifies a build: the cases, every source that affects it, headers, flags, compiler and Triton."""
    h = hashlib.sha256()
    for text in (spec, triton.__version__, *FLAGS, str(compiler), compiler.version()):
        h.update(text.encode() + b"\0")
    files = [p for folder in own_folders() for kind in ("*.py", "*.json") for p in sorted(folder.glob(kind))]
    for path in (*files, *sorted(SOURCES.iterdir()), *sorted(include.glob("NvInfer*.h"))):
        h.update(path.name.encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:24]


def own_folders() -> list[Path]:
    import jet_export.kernels
    import jet_export.plugins

    return [Path(str(package.__file__)).parent for package in (jet_export.plugins, jet_export.kernels)]


def compile_kernels(spec: str, folder: Path, emit: Emit) -> None:
    """Runs compile_kernels.py with the interpreter off and without line tables, which triple a cubin."""
    path, errors = folder / "spec.json", folder / "errors.txt"
    path.write_text(spec)
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-m", "jet_export.plugins.compile_kernels", str(path), str(folder)]
    start = time.monotonic()
    with (
        errors.open("w") as stderr,
        subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        assert process.stdout
        try:
            for line in process.stdout:
                emit(with_eta(line.rstrip(), time.monotonic() - start))
        except BaseException:
            process.kill()
            raise
    message = errors.read_text().strip()
    errors.unlink()
    if process.returncode == 2:
        what, *rest = message.splitlines()
        raise JetExportError(what, "\n".join(rest))
    if process.returncode:
        raise JetExportError(f"Compiling the kernels failed:\n{message[-2000:]}")


def with_eta(line: str, seconds: float) -> str:
    """ "[3/9] a_kernel" after 6 s -> with "6 s, about 12 s left"."""
    done, _, total = line.partition("]")[0].lstrip("[").partition("/")
    if not (done.isdecimal() and total.isdecimal()):
        return line
    left = seconds / int(done) * (int(total) - int(done))
    return f"{line}: {seconds:.0f} s" + (f", about {left:.0f} s left" if left >= 1 else "")


def compile_sources(compiler: Compiler, include: Path, folder: Path) -> None:
    cuda = Path(str(triton.__file__)).parent / "backends/nvidia/include"
    includes = ["-isystem", str(include), "-isystem", str(cuda), f"-I{SOURCES}", f"-I{folder}"]
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    command = [*compiler.words, *FLAGS, *includes, *sources, "-o", str(folder / NAME), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise JetExportError(
            f"Compiling the plugin library failed:\n{result.stderr.strip()[-2000:]}", f"Compiler: {compiler}"
        )
