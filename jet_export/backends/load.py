"""Loads a bundle's engine. Host, hashes and schema are checked before any native code is loaded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.eager import load_weights
from jet_export.backends.inductor.engine import InductorEngine
from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.bundle.manifest import Manifest, check_files, rebuild_hint
from jet_export.bundle.signature import check_signature
from jet_export.bundle.target import host_target
from jet_export.utils.errors import JetExportError


def load_engine(directory: str | Path, check: bool = True) -> tuple[Engine, Manifest]:
    """Load a bundle's engine. Raises JetExportError if the bundle is damaged, was built for another machine, or lacks
    the signature of the trusted key where one is configured (whatever `check` says)."""
    directory = Path(directory)
    check_signature(directory)
    manifest = Manifest.load(directory)
    backend = manifest.backend["name"]
    if check:
        check_host(directory, manifest)
    if backend in FLAVORS:
        from jet_export.backends.tensorrt.engine import TensorRTEngine

        if check:
            check_files(directory, manifest)
        return TensorRTEngine.open(directory, manifest), manifest
    if backend not in ("inductor", "onnx"):
        raise JetExportError(f"{directory}: backend {backend!r} is not known to this jet-export.")
    weights = checked_weights(directory, manifest) if check else load_weights(directory, manifest)
    if backend == "onnx":
        from jet_export.backends.onnx.engine import OnnxEngine

        return OnnxEngine.open(directory, manifest, weights), manifest
    return InductorEngine.open(directory, manifest, weights), manifest


def checked_weights(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """`load_weights` while every file is hashed. An error of `check_files` takes precedence over any other."""
    with ThreadPoolExecutor(1) as pool:
        files = pool.submit(check_files, directory, manifest)
        try:
            weights = load_weights(directory, manifest)
        finally:
            files.result()
    return weights


def check_bundle(directory: str | Path, manifest: Manifest) -> None:
    """Refuse a bundle for another machine or torch, one with a changed, missing or added file, and one that the trusted
    key has not signed."""
    check_signature(directory)
    check_host(directory, manifest)
    check_files(directory, manifest)


def check_host(directory: str | Path, manifest: Manifest) -> None:
    """Refuse a bundle for another machine or torch."""
    directory, again = Path(directory), rebuild_hint(manifest)
    built, here = manifest.backend.get("torch", ""), torch.__version__
    flavor = FLAVORS.get(manifest.backend["name"])
    if flavor is not None:
        flavor.check_version(directory, manifest.backend.get(flavor.backend, ""), again)
    elif built.split(".")[:2] != here.split(".")[:2]:
        raise JetExportError(f"{directory}: built with torch {built}, this is torch {here}.", again)
    if manifest.device.type == "cuda" and not torch.cuda.is_available():
        raise JetExportError(
            f"{directory}: built for a CUDA GPU ({manifest.target['arch']}), and torch sees none here.",
            "Run it on that GPU, or build a CPU engine with --device cpu.",
        )
    host = host_target(manifest.device)
    runs_on = [f"sm_{sm}" for sm in manifest.target.get("sms", [])] or [manifest.target["arch"]]
    if host["arch"] not in runs_on:
        raise JetExportError(f"{directory}: built for {manifest.target['arch']}, this is {host['arch']}.", again)
    lacking = sorted(set(manifest.target.get("isa", [])) - set(host.get("isa", [])))
    if lacking:
        raise JetExportError(f"{directory}: built for a CPU with {', '.join(lacking)}, which this one lacks.", again)
