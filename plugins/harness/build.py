"""Compiles the C harness, cached by the hash of its source, the headers and the compiler."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import triton

from jet_export.plugins.headers import cache_dir, find_headers
from jet_export.utils.compiler import find_compiler
from jet_export.utils.errors import JetExportError

SOURCE = Path(__file__).with_name("harness.cpp")
FLAGS = ("-std=c++17", "-O1", "-Wall", "-fPIC", "-shared")


def harness_library(headers: str | Path | None = None) -> Path:
    """The harness as a shared library. Raises JetExportError where headers or a compiler are missing."""
    include, compiler = find_headers(headers), find_compiler("the plugin harness")
    cuda = Path(str(triton.__file__)).parent / "backends/nvidia/include"
    h = hashlib.sha256(" ".join((str(compiler), *FLAGS)).encode())
    for path in (SOURCE, *sorted(include.glob("NvInfer*.h"))):
        h.update(path.name.encode() + b"\0" + path.read_bytes())
    to = cache_dir() / f"harness-{h.hexdigest()[:24]}.so"
    if to.is_file():
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_suffix(f".{os.getpid()}")
    includes = ["-isystem", str(include), "-isystem", str(cuda)]
    command = [*compiler.words, *FLAGS, *includes, str(SOURCE), "-o", str(partial), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        partial.unlink(missing_ok=True)
        raise JetExportError(f"Compiling the plugin harness failed:\n{result.stderr.strip()[-2000:]}")
    partial.rename(to)
    return to
