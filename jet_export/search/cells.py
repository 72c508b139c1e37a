"""Cells: the engines that are measured.

A model's step is its base (embedding, last norm, lm_head: a model without layers) and its layers, each of which
depends on its own kind, sizes and precision only. A layer's cell is a model of `space.layers` equal layers, built and
timed as any bundle; its latency is (cell - base) / layers. Several layers in a cell divide the noise of the
subtraction, and show the layer between its like, where the compiler fuses its norm with the residual before it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.search.points import Point, short
from jet_export.search.space import Space

UNUSED = JetDims(1, 16, 16)  # of the JetBlocks of a cell without any


@dataclass(frozen=True)
class Cell:
    """An engine to build and time. What it does not use is set to one value, so that equal cells are equal."""

    kind: str  # "base", "jet", "attn", "swa" or "whole"
    config: JetNemotronConfig
    layers: int
    fp8: bool
    state_dtype: str
    kv_cache_dtype: str

    def describe(self) -> dict[str, Any]:
        return {**self.__dict__, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        config = JetNemotronConfig.from_dict(values["config"], "cell")
        return cls(**{**values, "config": replace(config, raw={})})

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        precision = "fp8" if self.fp8 else "bf16"
        if self.kind == "jet":
            return f"jet {self.config.jet_dims(0)} {precision}, state {short(self.state_dtype)}"
        if self.kind in ("attn", "swa"):
            window = f" window {self.config.window_size}" if self.kind == "swa" else ""
            return f"{self.kind}{window} {precision}" + (", kv fp8" if self.kv_cache_dtype == "fp8" else "")
        if self.kind == "base":
            return "base"
        c = self.config
        sizes = dict.fromkeys(str(c.jet_dims(i)) for i, kind in enumerate(c.layer_types) if kind == "jet")
        return f"whole model of {', '.join(sizes) or 'attention'} {precision}"


def plain(config: JetNemotronConfig) -> JetNemotronConfig:
    """Without what a file said beside the sizes."""
    return replace(config, raw={}, max_position_embeddings=1)


def base_cell(preset: JetNemotronConfig) -> Cell:
    config = replace(plain(preset), layer_types=(), window_size=0, jet_layers=())
    return Cell("base", config.with_jet_dims({0: UNUSED}), 0, False, "float32", "auto")


def layer_cell(point: Point, config: JetNemotronConfig, layer: int, depth: int) -> Cell:
    """The cell of one layer of `config`, which is the point's."""
    kind = config.layer_types[layer]
    dims = config.jet_dims(layer) if kind == "jet" else UNUSED
    window = config.window_size if kind == "swa" else 0
    alone = replace(plain(config), layer_types=(kind,) * depth, window_size=window, jet_layers=())
    state, kv = (point.state_dtype, "auto") if kind == "jet" else ("float32", point.kv_cache_dtype)
    return Cell(kind, alone.with_jet_dims({0: dims}), depth, point.fp8, state, kv)


def whole_cell(point: Point, config: JetNemotronConfig) -> Cell:
    return Cell("whole", plain(config), config.num_hidden_layers, point.fp8, point.state_dtype, point.kv_cache_dtype)


def layer_cells(point: Point, preset: JetNemotronConfig, space: Space) -> Counter[Cell]:
    """Every layer's cell, and in how many layers it stands."""
    config = point.config(preset, space)
    return Counter(layer_cell(point, config, i, space.layers) for i in range(config.num_hidden_layers))


def cells_of(point: Point, preset: JetNemotronConfig, space: Space) -> list[Cell]:
    return [base_cell(preset), *layer_cells(point, preset, space)]
