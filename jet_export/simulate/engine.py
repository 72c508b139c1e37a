"""The engine that is simulated: a bundle, or a model that is not built, on the device whose steps a table holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from jet_export.bench.predict import StepTable, find_table
from jet_export.bench.rows import precision_name, precision_of
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.bundle.memory import weight_bytes
from jet_export.model.cache import StateSpec
from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import load_config
from jet_export.runtime.capacity import HOST_BYTES, Serving, capacity, pacing
from jet_export.simulate.replica import EngineModel
from jet_export.simulate.step_times import FittedTimes, fit_times
from jet_export.utils.errors import JetExportError

CHUNK, LENGTH, SEQUENCES = 2048, 4096, 64  # of a model that is not built


@dataclass(frozen=True, kw_only=True)
class PlannedEngine:
    """What capacity.py needs to know of an engine."""

    name: str
    precision: str
    config: JetNemotronConfig
    dtypes: Dtypes
    weights: int  # bytes
    limits: Limits
    table: StepTable

    @cached_property
    def specs(self) -> list[StateSpec]:
        return self.dtypes.specs(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes.model

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.table.gpu_bytes else "cpu")

    def model(self, serving: Serving, step_overhead: float = 0.0) -> tuple[EngineModel, FittedTimes]:
        """What a replica is with these serving options. Raises JetExportError for options that it could not serve with,
        and where the weights do not fit the device."""
        if serving.deterministic or serving.speculate != "off":
            raise JetExportError("simulate: neither deterministic mode nor drafts are simulated.")
        room = self.table.available() - self.weights
        if room <= 0:
            raise JetExportError(
                f"simulate: the weights of {self.name} {self.precision} do not fit {self.table.device}."
            )
        if serving.host_cache_bytes is None:
            serving = replace(serving, host_cache_bytes=HOST_BYTES)  # of the server's host, not of this one
        fitted = fit_times(self.table, self.config, self.dtypes, step_overhead)
        model = EngineModel(
            capacity=capacity(self, serving, room),
            times=fitted.times,
            overlap=self.device.type == "cuda",
            pacing=partial(pacing, self, serving),
        )
        return model, fitted


def bundle_engine(bundle: Path, measured: Path | None) -> PlannedEngine:
    """The engine of a bundle, and the table of its model and precision. Raises JetExportError."""
    m = Manifest.load(bundle)
    name, precision = m.model["name"], precision_of(m)
    return PlannedEngine(
        name=name,
        precision=precision,
        config=m.config,
        dtypes=m.dtypes,
        weights=m.files[WEIGHTS]["bytes"],
        limits=m.limits,
        table=find_table(name, precision, measured, "simulate"),
    )


def model_engine(
    model: str,
    *,
    fp8: bool = False,
    kv_cache_dtype: str = "auto",
    limits: Limits | None = None,
    measured: Path | None = None,
) -> PlannedEngine:
    """The engine that a model would have. Raises JetExportError."""
    config = load_config(model)
    kv_cache = "bfloat16" if kv_cache_dtype == "auto" else kv_cache_dtype
    dtypes = Dtypes.named(model="bfloat16", kv_cache=kv_cache, state="float32")
    precision = precision_name(dtypes, fp8=fp8)
    return PlannedEngine(
        name=model,
        precision=precision,
        config=config,
        dtypes=dtypes,
        weights=weight_bytes(config, dtypes.model, fp8),
        limits=limits or Limits(max_batch_size=SEQUENCES, max_seq_len=LENGTH, prefill_chunk=CHUNK),
        table=find_table(model, precision, measured, "simulate"),
    )
