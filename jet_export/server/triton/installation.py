"""Where Triton Inference Server is installed, and whether its Python backend works with this Python and numpy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jet_export.utils.errors import JetExportError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
INSTALL = (
    "Install one: pip install 'jet-export[serve]' brings nvidia-pytriton's, for Linux on x86-64 and Python up to 3.12; "
    "or run in NVIDIA's tritonserver container; or use --openai, which needs none."
)


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A tritonserver. `backends`: the directory of its backends; `libraries`: directories of shared libraries."""

    binary: Path
    backends: Path
    libraries: tuple[Path, ...] = ()

    @property
    def stub(self) -> Path:
        return self.backends / "python" / "triton_python_backend_stub"

    def environment(self) -> dict[str, str]:
        """The server's environment. Its Python backend uses the environment of the first python3 on PATH."""
        environment = dict(os.environ)
        paths = [*map(str, self.libraries), str(sysconfig.get_config_var("LIBDIR"))]
        paths += [p for p in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if p]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        return environment


def find_server(scratch: Path) -> Installation:
    """The tritonserver on PATH, or nvidia-pytriton's, whose backend is assembled under `scratch`.

    Raises JetExportError if there is none, or its Python backend is not for this Python.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        binary = Path(on_path).resolve()
        found = Installation(binary=binary, backends=binary.parents[1] / "backends")
    else:
        found = _wheel(scratch)
    check_stub(found)
    return found


def _wheel(scratch: Path) -> Installation:
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise JetExportError("serve: no tritonserver is installed.", INSTALL)
    package = Path(spec.origin).parent
    home = package / "tritonserver"
    stub = home / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        has = sorted(p.name for p in stub.parents[1].iterdir())
        raise JetExportError(
            f"nvidia-pytriton has a Python backend for Python {', '.join(has)}, and this is {PYTHON}.",
            "Use one of those, or --openai.",
        )
    backends = scratch / "backends"
    (backends / "python").mkdir(parents=True)
    for path in (*(home / "backends" / "python").iterdir(), stub):
        (backends / "python" / path.name).symlink_to(path)
    return Installation(
        binary=home / "bin" / "tritonserver",
        backends=backends,
        libraries=(package.parent / "nvidia_pytriton.libs",),
    )


def check_stub(server: Installation) -> None:
    """Raises JetExportError if the Python backend's stub is missing, or is for another Python or numpy."""
    stub = server.stub
    if not stub.is_file():
        raise JetExportError(f"{server.binary} has no Python backend ({stub} is missing).", INSTALL)
    content = stub.read_bytes()
    versions = {v.decode() for v in re.findall(rb"libpython(3\.\d+)", content)}
    if versions and PYTHON not in versions:
        raise JetExportError(
            f"{stub} is for Python {', '.join(sorted(versions))}, and this is Python {PYTHON}.",
            "Run jet-export with that Python, or build the stub for this one "
            "(github.com/triton-inference-server/python_backend, Building Custom Python Backend Stub).",
        )
    import numpy

    if int(numpy.__version__.split(".")[0]) >= 2 and b"numpy._core" not in content:
        raise JetExportError(
            f"{stub} works with numpy 1 only, and this is numpy {numpy.__version__}.",
            "Install the older one: pip install 'numpy<2'.",
        )
    tried = subprocess.run([stub], env=server.environment(), capture_output=True, text=True, check=False)
    if tried.returncode == 127 or "error while loading" in tried.stderr:
        raise JetExportError(
            f"{stub} does not start: {tried.stderr.strip()[-300:]}.",
            f"Install the missing library; Python's own is Debian's and Ubuntu's libpython{PYTHON}.",
        )
