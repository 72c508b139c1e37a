"""What every rung works on: a bundle on this machine, and what is derived from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from jet_export.backends.eager import EagerEngine, load_eager, load_weights
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.plugins.cases import Case, model_cases


@dataclass(kw_only=True)
class Site:
    """A bundle on this machine. `work`: a directory for intermediate files."""

    bundle: Path
    work: Path
    headers: Path | None = None
    fetch_headers: bool = False
    text: Path | None = None
    seed: int = 0

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.load(self.bundle)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def sm(self) -> int | None:
        if self.device.type != "cuda":
            return None
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    @cached_property
    def cases(self) -> list[Case]:
        m = self.manifest
        return model_cases(
            m.config,
            dtype=m.dtype,
            state_dtype=m.state_dtype,
            cache_dtype=m.kv_cache_dtype,
            interval=m.state_interval,
            rollback=m.rollback,
        )

    @cached_property
    def eager(self) -> EagerEngine:
        """The PyTorch model with the bundle's weights, on this machine's device whatever the engine's is; without the
        layer that drafts, which ONNX has not."""
        here = replace(self.manifest, mtp=False, target={**self.manifest.target, "device": self.device.type})
        return load_eager(self.bundle, here, load_weights(self.bundle, here))

    def plugin_library(self) -> Path:
        """The directory of the bundle's plugin library, or of one built for its model (for SM 9.0 without a GPU)."""
        from jet_export.plugins.library import NAME, library_for

        if (self.bundle / NAME).is_file():
            return self.bundle
        m = self.manifest
        return library_for(
            m.config,
            [self.sm or 90],
            dtype=m.dtype,
            state_dtype=m.state_dtype,
            cache_dtype=m.kv_cache_dtype,
            state_interval=m.state_interval,
            rollback=m.rollback,
            headers=self.headers,
            fetch=self.fetch_headers,
            emit=print,
        )

    def graph(self) -> Path:
        """The bundle's ONNX graph, or one exported from its model."""
        from jet_export.backends.onnx.export import GRAPH, require_onnx, write_onnx

        if (self.bundle / GRAPH).is_file():
            return self.bundle / GRAPH
        require_onnx()
        if not (self.work / WEIGHTS).exists():
            shutil.copyfile(self.bundle / WEIGHTS, self.work / WEIGHTS)  # onnx's checker refuses links
        head, embedding = self.eager.model.lm_head, self.eager.model.embed_tokens
        held = getattr(head, "weight", None)
        if held is not None and held.data_ptr() == embedding.weight.data_ptr():
            head.weight = embedding.weight  # one initializer, as the file has one tensor
        return write_onnx(self.eager.model, self.work, replace(self.manifest.dtypes, mtp=False), self.manifest.limits)
