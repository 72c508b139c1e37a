"""A point of the space: one choice of everything, and the architecture that it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from jet_export.bundle import torch_dtype
from jet_export.errors import JetExportError
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.search.space import LETTERS, Counts, Space, layout_of


@dataclass(frozen=True)
class Point:
    """`sizes`: a JetBlock's, one a group of `space.share`; `layout`: a letter a layer."""

    sizes: tuple[JetDims, ...]
    layout: str
    window_size: int
    fp8: bool
    state_dtype: str
    kv_cache_dtype: str  # "auto" or "fp8"

    def kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.kv_cache_dtype == "auto" else torch_dtype(self.kv_cache_dtype)

    def config(self, preset: JetNemotronConfig, space: Space) -> JetNemotronConfig:
        """Raises JetExportError where the kernels do not compute it, or a jet layer is in no group."""
        base = replace(
            preset,
            layer_types=tuple(LETTERS[c] for c in self.layout),
            window_size=self.window_size if "s" in self.layout else preset.window_size,
            jet_layers=(),
        )
        return base.with_jet_dims(self.jet_dims(space))

    def jet_dims(self, space: Space) -> dict[int, JetDims]:
        jets = [i for i, c in enumerate(self.layout) if c == "j"]
        if isinstance(space.share, str):
            return dict.fromkeys(jets, self.sizes[0])
        group = {i: g for g, layers in enumerate(space.share) for i in layers}
        for i in jets:
            if i not in group:
                raise JetExportError(f"layer {i} is a jet layer and in no group of jet.share")
        return {i: self.sizes[group[i]] for i in jets}

    def label(self, space: Space, preset: JetNemotronConfig) -> str:
        """What tells the points of this space apart, in a few words."""
        words = [run_lengths([str(d) for d in self.sizes])]
        words += ["fp8" if self.fp8 else "bf16"] if len(space.fp8) > 1 or self.fp8 else []
        words += [f"state {short(self.state_dtype)}"] if len(space.state_dtype) > 1 else []
        words += [f"kv {self.kv_cache_dtype}"] if len(space.kv_cache_dtype) > 1 else []
        words += [f"window {self.window_size}"] if len(space.window_size) > 1 else []
        words += [self.layout] if self.layout != layout_of(preset) or isinstance(space.layouts, Counts) else []
        return " ".join(words)


def run_lengths(words: list[str]) -> str:
    return "+".join(w if n == 1 else f"{n}*{w}" if len(words) > n else w
                    for w, n in ((w, len(list(run))) for w, run in itertools.groupby(words)))  # fmt: skip


def short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype)


def layouts_under(counts: Counts, layers: int) -> Iterator[str]:
    """Every placement of every allowed number of attn and swa layers."""
    for attn, swa in itertools.product(counts.attn, counts.swa):
        for a in itertools.combinations(range(layers), attn):
            rest = [i for i in range(layers) if i not in a]
            for s in itertools.combinations(rest, swa):
                yield "".join("a" if i in a else "s" if i in s else "j" for i in range(layers))


def count_layouts(space: Space, layers: int) -> int:
    if not isinstance(space.layouts, Counts):
        return len(space.layouts)
    pairs = itertools.product(space.layouts.attn, space.layouts.swa)
    return sum(math.comb(layers, a) * math.comb(layers - a, s) for a, s in pairs if a + s <= layers)


def count_points(space: Space, preset: JetNemotronConfig) -> int:
    axes = (space.fp8, space.state_dtype, space.kv_cache_dtype, space.window_size)
    per_layout = math.prod(map(len, axes)) * len(space.sizes) ** space.groups
    return per_layout * count_layouts(space, preset.num_hidden_layers)


def all_points(space: Space, preset: JetNemotronConfig) -> Iterator[Point]:
    """Every point once: sizes of groups that a layout does not use, and windows without swa layers, stay the first."""
    n = preset.num_hidden_layers
    layouts = layouts_under(space.layouts, n) if isinstance(space.layouts, Counts) else iter(space.layouts)
    seen: set[Point] = set()
    for layout in layouts:
        axes = (space.window_size, space.fp8, space.state_dtype, space.kv_cache_dtype)
        for sizes in itertools.product(space.sizes, repeat=space.groups):
            for choice in itertools.product(*axes):
                point = canonical(Point(sizes, layout, *choice), space)
                if point not in seen:
                    seen.add(point)
                    yield point


def canonical(point: Point, space: Space) -> Point:
    """The point with what its layout does not use set to the space's first choice."""
    if isinstance(space.share, tuple):
        sizes = (
            d if any(point.layout[i] == "j" for i in group) else space.sizes[0]
            for d, group in zip(point.sizes, space.share, strict=True)
        )
        point = replace(point, sizes=tuple(sizes))
    if "s" not in point.layout:
        point = replace(point, window_size=space.window_size[0])
    if "j" not in point.layout:
        point = replace(point, sizes=(space.sizes[0],) * space.groups, state_dtype=space.state_dtype[0])
    if not set(point.layout) & {"a", "s"}:
        point = replace(point, kv_cache_dtype=space.kv_cache_dtype[0])
    return point
