"""The bundle: a directory with an engine, its weights, its tokenizer and `manifest.json`, which describes them all.

Loading checks the schema, the host and every file's sha256 before any native code is loaded. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from jet_export.errors import JetExportError
from jet_export.model.config import JetNemotronConfig
from jet_export.trt.flavors import FLAVORS

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Limits:
    """What the engine's pools and graphs are made for."""

    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int  # most tokens of one sequence in one prefill call


@dataclass
class Manifest:
    model: dict[str, Any]  # name, source, config (published layout), licence
    backend: dict[str, Any]  # name, torch and triton versions
    target: dict[str, Any]  # device type and what it must offer
    dtype: str
    kv_cache_dtype: str
    state_dtype: str
    limits: Limits
    quantization: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    build: dict[str, Any] = field(default_factory=dict)  # command, inputs, date, seconds
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> sha256, bytes
    schema_version: int = SCHEMA_VERSION

    @property
    def config(self) -> JetNemotronConfig:
        return JetNemotronConfig.from_dict(self.model["config"], where="manifest.json: model.config")

    @property
    def device(self) -> torch.device:
        return torch.device(self.target["device"])

    @property
    def rebuild_command(self) -> str:
        return " ".join(self.build.get("command", [])) or "jet-export build"

    @property
    def fingerprint(self) -> str:
        """Names what the engine computes: its files, the model and its dtypes. Equal for copies of a bundle."""
        files = {name: entry["sha256"] for name, entry in self.files.items()}
        values = [self.model["config"], self.dtype, self.kv_cache_dtype, self.state_dtype, files]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        (directory / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Parse manifest.json. Raises JetExportError where it is no bundle or of another schema."""
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise JetExportError(f"{directory}: not a bundle (no {MANIFEST}).", "Make one with `jet-export build`.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values["schema_version"]
        except (ValueError, KeyError, TypeError):
            raise JetExportError(f"{path}: damaged (not a manifest).", "Build the bundle again.") from None
        if version != SCHEMA_VERSION:
            again = " ".join(values.get("build", {}).get("command", ["jet-export build"]))
            raise JetExportError(
                f"{path}: schema version {version}, this jet-export reads {SCHEMA_VERSION}.",
                f"Build it again: {again} --force",
            )
        try:
            return cls(**{**values, "limits": Limits(**values["limits"])})
        except (TypeError, KeyError) as e:
            raise JetExportError(f"{path}: damaged ({e}).", "Build the bundle again.") from None


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, {"fp8": "float8_e4m3fn"}.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise JetExportError(f"dtype {name!r} is not known.", "Known: bfloat16, float32, fp8 (KV cache).")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sha256_file(path: Path) -> str:
    """In long pieces, during which other threads of Python run."""
    digest, buffer = hashlib.sha256(), bytearray(min(path.stat().st_size, 1 << 22) or 1)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(view[:n])
    return digest.hexdigest()


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file but the manifest."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(sha256_file, paths))
    return {
        str(p.relative_to(directory)): {"sha256": s, "bytes": p.stat().st_size}
        for p, s in zip(paths, sums, strict=True)
    }


def host_target(device: torch.device) -> dict[str, Any]:
    """What code compiled here for `device` needs from the machine that runs it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"device": "cuda", "arch": f"sm_{major}{minor}", "gpu": torch.cuda.get_device_name(device)}
    return {"device": "cpu", "arch": platform.machine(), "isa": _cpu_isa()}


def _cpu_isa() -> list[str]:
    """The vector extensions of this CPU, which -march=native may have used."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [torch.backends.cpu.get_cpu_capability()]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(f for f in flags if f.startswith(("avx", "amx", "fma", "bmi", "sve", "asimd", "f16c")))


def check_bundle(directory: str | Path, manifest: Manifest) -> None:
    """Refuse a bundle for another machine or torch, and one with a changed, missing or added file."""
    check_host(directory, manifest)
    check_files(directory, manifest)


def _again(manifest: Manifest) -> str:
    return f"Build it again here: {manifest.rebuild_command} --force"


def check_host(directory: str | Path, manifest: Manifest) -> None:
    """Refuse a bundle for another machine or torch."""
    directory, again = Path(directory), _again(manifest)
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


def check_files(directory: str | Path, manifest: Manifest) -> None:
    """Refuse a bundle with a changed, missing or added file."""
    directory, again = Path(directory), _again(manifest)
    on_disk = describe_files(directory)
    for name, entry in manifest.files.items():
        if name not in on_disk:
            raise JetExportError(f"{directory}: {name} is missing.", again)
        if on_disk[name]["sha256"] != entry["sha256"]:
            raise JetExportError(f"{directory}: {name} has changed since it was built (sha256 differs).", again)
    added = sorted(on_disk.keys() - manifest.files.keys())
    if added:
        raise JetExportError(f"{directory}: {added[0]} is not in the manifest.", "Remove it, or build again.")
