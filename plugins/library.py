"""Builds the plugin library: kernels to cubins in a process of its own, then g++; cached by the hash of all inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

from jet_export.errors import JetExportError
from jet_export.plugins.cases import Case, case_to_dict
from jet_export.plugins.headers import cache_dir, find_headers

SOURCES = Path(__file__).parent / "src"
NAME = "libjet_plugins.so"
FLAGS = ("-std=c++17", "-O2", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,defs")


def build_library(
    cases: list[Case], sms: list[int], headers: str | Path | None = None, cache: Path | None = None, quiet: bool = True
) -> Path:
    """The folder with libjet_plugins.so, kernels.inc, kernels.json and the cubins, built unless the cache holds it.

    `sms`: 80, 86, 89, 90, ...: the architectures to hold cubins for. Raises JetExportError when headers or a compiler
    are missing or a kernel does not fit an SM."""
    include = find_headers(headers)
    compiler = find_compiler()
    spec = json.dumps({"cases": [case_to_dict(case) for case in cases], "sms": sorted(set(sms))}, sort_keys=True)
    folder = (cache or cache_dir()) / f"plugins-{digest(spec, include, compiler)}"
    if (folder / NAME).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".plugins-") as partial:
        compile_kernels(spec, Path(partial), quiet)
        compile_sources(compiler, include, Path(partial))
        try:
            os.rename(partial, folder)
        except OSError:  # another process was first
            if not (folder / NAME).is_file():
                raise
        else:
            Path(partial).mkdir()  # for TemporaryDirectory to remove
    return folder


def find_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise JetExportError(
            f"No C++ compiler: {os.environ.get('CXX') or 'g++'} was not found.",
            "Install g++, or set CXX to a C++17 compiler.",
        )
    return compiler


def digest(spec: str, include: Path, compiler: str) -> str:
    """Names a build: the cases, every source that decides it, headers, flags, compiler and Triton."""
    h = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    for text in (spec, triton.__version__, *FLAGS, compiler, version):
        h.update(text.encode() + b"\0")
    files = [p for folder in own_folders() for p in sorted(folder.glob("*.py"))]
    for path in (*files, *sorted(SOURCES.iterdir()), *sorted(include.glob("NvInfer*.h"))):
        h.update(path.name.encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:24]


def own_folders() -> list[Path]:
    import jet_export.kernels
    import jet_export.plugins

    return [Path(str(package.__file__)).parent for package in (jet_export.plugins, jet_export.kernels)]


def compile_kernels(spec: str, folder: Path, quiet: bool) -> None:
    """Runs compile_kernels.py with the interpreter off and without line tables, which triple a cubin."""
    path = folder / "spec.json"
    path.write_text(spec)
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-m", "jet_export.plugins.compile_kernels", str(path), str(folder)]
    result = subprocess.run(
        command, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE if quiet else None
    )
    if result.returncode == 2:
        raise JetExportError(result.stderr.strip().splitlines()[0], "\n".join(result.stderr.strip().splitlines()[1:]))
    if result.returncode:
        raise JetExportError(f"Compiling the kernels failed:\n{result.stderr.strip()[-2000:]}")


def compile_sources(compiler: str, include: Path, folder: Path) -> None:
    cuda = Path(str(triton.__file__)).parent / "backends/nvidia/include"
    includes = ["-isystem", str(include), "-isystem", str(cuda), f"-I{SOURCES}", f"-I{folder}"]
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    command = [compiler, *FLAGS, *includes, *sources, "-o", str(folder / NAME), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise JetExportError(
            f"Compiling the plugin library failed:\n{result.stderr.strip()[-2000:]}", f"Compiler: {compiler}"
        )
