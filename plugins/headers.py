"""Finds the TensorRT headers: in a given folder, an installed TensorRT or, only when asked for, a pinned wheel.

The plugin ABI is the same for headers of 10.14, 11.1 and TensorRT for RTX. CUDA's own headers come with triton.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from jet_export.utils.errors import JetExportError

WHEEL = "kernel_lens-2.0.1-py3-none-any.whl"
REQUIREMENT = "kernel-lens==2.0.1"
SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
INSIDE = "kernel_lens/include/tensorrt/"
NOTICE = (
    f"TensorRT 10.14 headers, from the PyPI wheel {WHEEL} (sha256 {SHA256}).\n"
    "Headers: Copyright (c) NVIDIA CORPORATION & AFFILIATES, licence Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)."
)


def cache_dir() -> Path:
    """JET_EXPORT_CACHE, or jet-export under XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("JET_EXPORT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jet-export"


def fetched_headers() -> Path:
    return cache_dir() / f"tensorrt-headers-{SHA256[:16]}"


def installed_headers() -> Path | None:
    """The folder of an installed TensorRT's NvInferRuntime.h."""
    roots = [os.environ[name] for name in ("TENSORRT_ROOT", "TENSORRT_DIR") if os.environ.get(name)]
    folders = [Path(root) / "include" for root in roots]
    machine = os.uname().machine
    folders += [Path(f"/usr/include/{machine}-linux-gnu"), Path("/usr/include"), Path("/usr/local/tensorrt/include")]
    return next((folder for folder in folders if (folder / "NvInferRuntime.h").is_file()), None)


def find_headers(given: str | Path | None = None) -> Path:
    """A folder with NvInferRuntime.h: `given`, else an installed one, else the one that fetch_headers() unpacked."""
    if given is not None:
        if not (Path(given) / "NvInferRuntime.h").is_file():
            raise JetExportError(
                f"{given}: holds no NvInferRuntime.h.", "Give the folder that holds TensorRT's headers."
            )
        return Path(given)
    found = installed_headers()
    if found is None and (fetched_headers() / "NvInferRuntime.h").is_file():
        found = fetched_headers()
    if found is None:
        raise JetExportError(
            "The TensorRT headers were not found, which the plugin library is compiled with.",
            "Install TensorRT's development package, give --tensorrt-headers DIR, or download them: --fetch-headers.",
        )
    return found


def headers_for(given: str | Path | None, fetch: bool, emit: Callable[[str], None] = print) -> Path:
    """The folder to compile with: `given`, an installed one, or with `fetch` the pinned wheel's. Raises JetExportError
    naming the three ways where there is none."""
    if given is None and fetch and installed_headers() is None:
        return fetch_headers(emit)
    return find_headers(given)


def fetch_headers(emit: Callable[[str], None] = print) -> Path:
    """Downloads the wheel with pip, checks its hash, unpacks its headers, and reports source and licence."""
    folder = fetched_headers()
    if not (folder / "NvInferRuntime.h").is_file():
        downloads = cache_dir() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command = [*pip, "--dest", str(downloads), REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise JetExportError(
                f"{REQUIREMENT} could not be downloaded: {result.stderr.strip()[-500:]}",
                "Give the folder of TensorRT's headers instead: --tensorrt-headers DIR.",
            )
        unpack(downloads / WHEEL, folder)
    for line in NOTICE.splitlines():
        emit(line)
    return folder


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the wheel's headers into a folder, which appears complete or not at all."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise JetExportError(f"{wheel}: sha256 {found} is not the pinned {SHA256}.", "Delete it and try again.")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(INSIDE) and name.endswith(".h"):
                (partial / Path(name).name).write_bytes(archive.read(name))
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        if not (folder / "NvInferRuntime.h").is_file():
            raise
