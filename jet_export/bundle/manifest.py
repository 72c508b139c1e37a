"""The bundle: a directory with an engine, its weights, its tokenizer and `manifest.json`, which describes them all.

Loading checks the schema, the host and every file's sha256 before any native code is loaded. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field

from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.entries import (
    BackendEntry,
    BuildEntry,
    CacheDtype,
    Dtype,
    FileEntry,
    InsidePath,
    ModelEntry,
    QuantizationEntry,
    TargetEntry,
)
from jet_export.bundle.limits import Limits
from jet_export.model.config import JetNemotronConfig
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import sha256_file
from jet_export.utils.schema import CheckedAs, parse, read_json

SCHEMA_VERSION = 3  # 2: no state_interval and rollback
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"  # signature.py
WEIGHTS = "weights.safetensors"


@dataclass(kw_only=True)
class Manifest:
    """`manifest.json`; the types are its schema."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: Annotated[dict[str, Any], CheckedAs(ModelEntry)]  # name, source, config (published layout), licence
    backend: Annotated[
        dict[str, Any], CheckedAs(BackendEntry)
    ]  # and versions; dependent_launch: --fuse-decode was given
    target: Annotated[dict[str, Any], CheckedAs(TargetEntry)]  # device type and what it must offer
    dtype: Dtype
    kv_cache_dtype: CacheDtype
    state_dtype: Dtype
    limits: Limits
    state_interval: Annotated[int, Field(ge=1, le=1024)] = 1  # recurrent states are written every so many tokens
    rollback: Annotated[int, Field(ge=0, le=64)] = 0  # the most tokens of a sequence in a verify call; 0: none
    mtp: bool = False  # the bundle has the checkpoint's multi-token-prediction layer, which drafts
    fast_accumulation: bool = False  # of FP8 products in the library's kernels
    quantization: Annotated[dict[str, Any] | None, CheckedAs(QuantizationEntry | None)] = None
    warnings: list[str] = field(default_factory=list)
    build: Annotated[dict[str, Any], CheckedAs(BuildEntry)] = field(
        default_factory=dict
    )  # command, inputs, date, seconds
    files: dict[InsidePath, Annotated[dict[str, Any], CheckedAs(FileEntry)]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def config(self) -> JetNemotronConfig:
        return JetNemotronConfig.from_dict(self.model["config"], where="manifest.json: model.config")

    @property
    def dtypes(self) -> Dtypes:
        return Dtypes.named(
            model=self.dtype,
            kv_cache=self.kv_cache_dtype,
            state=self.state_dtype,
            state_interval=self.state_interval,
            rollback=self.rollback,
            mtp=self.mtp,
            fast_accumulation=self.fast_accumulation,
        )

    @property
    def fp8_layers(self) -> list[str]:
        """Published names of the FP8 projections."""
        return list((self.quantization or {}).get("fp8", {}))

    @property
    def device(self) -> torch.device:
        return torch.device(self.target["device"])

    @property
    def dependent_launch(self) -> bool:
        """Whether kernels wait for their inputs themselves (await_inputs in kernels/common.py), decode_one's linear
        layers take in what stands around them, and there is a decode_few."""
        return self.backend.get("dependent_launch") is True

    @property
    def weight_bytes(self) -> int:
        """Of weights.safetensors. Raises JetExportError where the bundle has none."""
        if WEIGHTS not in self.files:
            raise JetExportError(f"{MANIFEST}: files has no {WEIGHTS}.", rebuild_hint(self))
        return int(self.files[WEIGHTS]["bytes"])

    @property
    def rebuild_command(self) -> str:
        return " ".join(self.build.get("command", [])) or "jet-export build"

    @property
    def fingerprint(self) -> str:
        """Identifies what the engine computes: its files, the model and its dtypes. Equal for copies of a bundle."""
        files = {name: entry["sha256"] for name, entry in self.files.items()}
        values = [self.model["config"], self.dtype, self.kv_cache_dtype, self.state_dtype, files]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        (directory / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Parse manifest.json. Raises JetExportError where there is none, and for another schema version."""
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise JetExportError(f"{directory}: not a bundle (no {MANIFEST}).", "Make one with `jet-export build`.")
        again = "Build the bundle again."
        values = read_json(path, again)
        version = values.get("schema_version") if isinstance(values, dict) else None
        if type(version) is not int:
            raise JetExportError(f"{path}: damaged (not a manifest).", again)
        if version != SCHEMA_VERSION:
            build = values.get("build")
            command = build.get("command") if isinstance(build, dict) else None
            given = isinstance(command, list) and bool(command) and all(isinstance(c, str) for c in command)
            raise JetExportError(
                f"{path}: schema version {version}, this jet-export reads {SCHEMA_VERSION}.",
                f"Build it again: {' '.join(command or []) if given else 'jet-export build'} --force",
            )
        manifest = parse(cls, values, str(path), again, table="object", closed=False)
        _ = manifest.config, manifest.dtypes  # raise what is wrong with them now
        return manifest


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file but the manifest and its signature."""
    left_out = directory / MANIFEST, directory / SIGNATURE
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p not in left_out)
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(sha256_file, paths))
    return {
        str(p.relative_to(directory)): {"sha256": s, "bytes": p.stat().st_size}
        for p, s in zip(paths, sums, strict=True)
    }


def rebuild_hint(manifest: Manifest) -> str:
    return f"Build it again here: {manifest.rebuild_command} --force"


def check_files(directory: str | Path, manifest: Manifest) -> None:
    """Refuse a bundle with a changed, missing or added file."""
    directory, again = Path(directory), rebuild_hint(manifest)
    on_disk = describe_files(directory)
    for name, entry in manifest.files.items():
        if name not in on_disk:
            raise JetExportError(f"{directory}: {name} is missing.", again)
        if on_disk[name]["sha256"] != entry["sha256"]:
            raise JetExportError(f"{directory}: {name} has changed since it was built (sha256 differs).", again)
    added = sorted(on_disk.keys() - manifest.files.keys())
    if added:
        raise JetExportError(f"{directory}: {added[0]} is not in the manifest.", "Remove it, or build again.")
