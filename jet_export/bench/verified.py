"""Correctness before speed: the last verification of exactly this bundle, by this code, on this machine's device.

A figure is printed only for a bundle that `verify` has passed. The outcome is cached in the user's cache directory, by
a hash of the manifest (which holds every file's sha256), of this package's sources, of torch's version and of the
device. When any of them changes, the bundle is verified again before it is timed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jet_export.bundle.manifest import MANIFEST, Manifest
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

if TYPE_CHECKING:
    from jet_export.verify.verify import Verification


@dataclass(frozen=True)
class Verdict:
    """What verify found. `key`: the hash that identifies what was verified."""

    key: str
    passed: bool
    failures: tuple[str, ...]
    date: str


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jet-export" / "verify"


def source_digest() -> str:
    """A hash of this package's Python and C++ sources, wherever they are imported from."""
    from jet_export import kernels, model, plugins

    roots = [Path(__file__).parents[1], *(Path(next(iter(p.__path__))) for p in (kernels, model, plugins))]
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".json")):
            if "data" not in path.relative_to(root).parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(bundle: Path) -> str:
    device = Manifest.load(bundle).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
    parts = (bundle / MANIFEST).read_bytes(), source_digest().encode(), torch.__version__.encode(), name.encode()
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def remember(bundle: Path, verification: Verification) -> Verdict:
    """Cache the outcome; where the cache cannot be written, the next bench verifies again."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    verdict = Verdict(key_of(bundle), verification.passed, tuple(verification.failures()), date)
    path = cache_directory() / f"{verdict.key}.json"
    with suppress(OSError):
        write_atomically(path, json.dumps(asdict(verdict)) + "\n")
    return verdict


def recall(bundle: Path) -> Verdict | None:
    """The outcome for exactly this bundle, code and device; None where there is none."""
    key = key_of(bundle)
    try:
        values = json.loads((cache_directory() / f"{key}.json").read_text(encoding="utf-8"))
        verdict = Verdict(**{**values, "failures": tuple(values["failures"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return verdict if verdict.key == key else None


def require_verified(bundle: Path, emit: Callable[[str], None]) -> Verdict:
    """The cached verdict, or that of a verification run now. Raises JetExportError where it failed."""
    verdict = recall(bundle)
    if verdict is not None and verdict.passed:
        emit(f"verified {verdict.date}: passed")
        return verdict
    from jet_export.verify.verify import verify_bundle

    emit(f"{bundle}: verified first, since no figure is given without it")
    verdict = remember(bundle, verify_bundle(bundle, None, 0, emit))
    if not verdict.passed:
        raise JetExportError(
            f"{bundle}: verify fails ({len(verdict.failures)} failures, the first: {verdict.failures[0]}), "
            "so no speed is measured.",
            f"See jet-export verify {bundle}",
        )
    return verdict
