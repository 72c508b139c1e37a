"""Cells: the engines that are measured.

A model's step is its base (embedding, last norm, lm_head: a model without layers) and its layers, each of which
depends on its own kind, sizes and precision only. A layer's cell is a model of `space.layers` equal layers, built and
timed like any other bundle; the layer's latency is (cell - base) / layers. With several layers in a cell the noise of
the subtraction is divided, and each layer follows one of its kind, so that the compiler fuses its norm with the
residual before it, as in the whole model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.search.points import Point, short_dtype
from jet_export.search.space import Space

UNUSED = JetDims(1, 16, 16)  # JetBlock sizes of a cell without JetBlocks


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An engine to build and time. Fields that its kind does not use hold one fixed value, so that equal engines
    compare equal."""

    kind: str  # "base", "jet", "attn", "swa" or "whole"
    config: JetNemotronConfig
    layers: int
    fp8: bool
    state_dtype: str
    kv_cache_dtype: str

    def describe(self) -> dict[str, Any]:
        """JSON types only; part of the database's keys."""
        return {**self.__dict__, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        config = JetNemotronConfig.from_dict(values["config"], "cell")
        return cls(**{**values, "config": replace(config, raw={})})

    @property
    def key(self) -> str:
        """A hash, which names the bundle and its lock."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        precision = "fp8" if self.fp8 else "bf16"
        if self.kind == "jet":
            shared = f" {self.config.key_heads} key heads" if self.config.jet_conv == "static" else ""
            return f"jet {self.config.jet_dims(0)}{shared} {precision}, state {short_dtype(self.state_dtype)}"
        if self.kind in ("attn", "swa"):
            window = f" window {self.config.window_size}" if self.kind == "swa" else ""
            return f"{self.kind}{window} {precision}" + (", kv fp8" if self.kv_cache_dtype == "fp8" else "")
        if self.kind == "base":
            return "base"
        c = self.config
        sizes = dict.fromkeys(str(c.jet_dims(i)) for i, kind in enumerate(c.layer_types) if kind == "jet")
        return f"whole model of {', '.join(sizes) or 'attention'} {precision}"


def without_extras(config: JetNemotronConfig) -> JetNemotronConfig:
    """Without the fields of a config.json that no latency depends on."""
    return replace(config, raw={}, max_position_embeddings=1)


def without_jet_layers(config: JetNemotronConfig) -> JetNemotronConfig:
    """With one size for the JetBlocks or Gated DeltaNets that it does not have."""
    return replace(config, jet_num_key_heads=min(config.jet_num_key_heads, 1)).with_jet_dims({0: UNUSED})


def base_cell(preset: JetNemotronConfig) -> Cell:
    """The engine without layers."""
    config = replace(without_extras(preset), layer_types=(), window_size=0, jet_layers=())
    return Cell(
        kind="base",
        config=without_jet_layers(config),
        layers=0,
        fp8=False,
        state_dtype="float32",
        kv_cache_dtype="auto",
    )


def layer_cell(point: Point, config: JetNemotronConfig, layer: int, depth: int) -> Cell:
    """The cell of a layer of `config`, the point's architecture: `depth` layers like it."""
    kind = config.layer_types[layer]
    window = config.window_size if kind == "swa" else 0
    alone = replace(without_extras(config), layer_types=(kind,) * depth, window_size=window, jet_layers=())
    state, kv = (point.state_dtype, "auto") if kind == "jet" else ("float32", point.kv_cache_dtype)
    return Cell(
        kind=kind,
        config=alone.with_jet_dims({0: config.jet_dims(layer)}) if kind == "jet" else without_jet_layers(alone),
        layers=depth,
        fp8=point.fp8,
        state_dtype=state,
        kv_cache_dtype=kv,
    )


def whole_cell(point: Point, config: JetNemotronConfig) -> Cell:
    """The whole model."""
    return Cell(
        kind="whole",
        config=without_extras(config),
        layers=config.num_hidden_layers,
        fp8=point.fp8,
        state_dtype=point.state_dtype,
        kv_cache_dtype=point.kv_cache_dtype,
    )


def layer_cells(point: Point, preset: JetNemotronConfig, space: Space) -> Counter[Cell]:
    """The cells of the point's layers, and how many layers each stands for."""
    config = point.config(preset, space)
    return Counter(layer_cell(point, config, i, space.layers) for i in range(config.num_hidden_layers))


def cells_of(point: Point, preset: JetNemotronConfig, space: Space) -> list[Cell]:
    """The cells that a prediction of the point needs."""
    return [base_cell(preset), *layer_cells(point, preset, space)]
