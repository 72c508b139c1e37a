"""A point of the space: one choice of everything, and the architecture that it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from jet_export.bundle.dtypes import torch_dtype
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.search.space import LETTERS, Counts, Space, layout_of
from jet_export.utils.errors import JetExportError

MANY = 4096  # layouts up to which each is looked at to count points


@dataclass(frozen=True)
class Point:
    """`sizes`: a JetBlock's, one a group of `space.share` with a jet layer; `layout`: a letter a layer."""

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
        groups = used_groups(self.layout, space).values()
        dims = {i: d for d, layers in zip(self.sizes, groups, strict=True) for i in layers}
        for i, c in enumerate(self.layout):
            if c == "j" and i not in dims:
                raise JetExportError(f"layer {i} is a jet layer and in no group of jet.share")
        return dims

    def label(self, space: Space, preset: JetNemotronConfig) -> str:
        """What tells the points of this space apart, in a few words."""
        words = [run_lengths([str(d) for d in self.sizes]) or "attention"]
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


def used_groups(layout: str, space: Space) -> dict[int, tuple[int, ...]]:
    """The jet layers of each group of `space.share` that has some."""
    groups = space.share if isinstance(space.share, tuple) else (range(len(layout)),)
    jets = {g: tuple(i for i in layers if layout[i] == "j") for g, layers in enumerate(groups)}
    return {g: layers for g, layers in jets.items() if layers}


def feasible(counts: Counts, layers: int) -> list[tuple[int, int]]:
    """The numbers of attn and swa layers that fit the model."""
    return [(a, s) for a, s in itertools.product(counts.attn, counts.swa) if a + s <= layers]


def layouts_under(counts: Counts, layers: int) -> Iterator[str]:
    """Every placement of every allowed number of attn and swa layers."""
    for attn, swa in feasible(counts, layers):
        for a in itertools.combinations(range(layers), attn):
            rest = [i for i in range(layers) if i not in a]
            for s in itertools.combinations(rest, swa):
                yield "".join("a" if i in a else "s" if i in s else "j" for i in range(layers))


def layouts_of(space: Space, layers: int) -> Iterator[str]:
    return layouts_under(space.layouts, layers) if isinstance(space.layouts, Counts) else iter(space.layouts)


def count_points(space: Space, preset: JetNemotronConfig) -> int:
    """As many as all_points yields. At most so many where too many layouts are searched to look at each."""
    n = preset.num_hidden_layers

    def per_layout(attn: int, swa: int, groups: int) -> int:
        window = len(space.window_size) if swa else 1
        state = len(space.state_dtype) if attn + swa < n else 1
        kv = len(space.kv_cache_dtype) if attn + swa else 1
        return len(space.fp8) * window * state * kv * len(space.sizes) ** groups

    if isinstance(space.layouts, Counts):
        pairs = [(a, s, math.comb(n, a) * math.comb(n - a, s)) for a, s in feasible(space.layouts, n)]
        if sum(times for *_, times in pairs) > MANY:
            return sum(times * per_layout(a, s, min(space.groups, n - a - s)) for a, s, times in pairs)
    return sum(per_layout(x.count("a"), x.count("s"), len(used_groups(x, space))) for x in layouts_of(space, n))


def all_points(space: Space, preset: JetNemotronConfig) -> Iterator[Point]:
    """Every point once: groups without a jet layer have no sizes, and windows without swa layers stay the first."""
    seen: set[Point] = set()
    for layout in layouts_of(space, preset.num_hidden_layers):
        axes = (space.window_size, space.fp8, space.state_dtype, space.kv_cache_dtype)
        for sizes in itertools.product(space.sizes, repeat=len(used_groups(layout, space))):
            for choice in itertools.product(*axes):
                point = canonical(Point(sizes, layout, *choice), space)
                if point not in seen:
                    seen.add(point)
                    yield point


def canonical(point: Point, space: Space) -> Point:
    """The point with what its layout does not use set to the space's first choice."""
    if "s" not in point.layout:
        point = replace(point, window_size=space.window_size[0])
    if "j" not in point.layout:
        point = replace(point, state_dtype=space.state_dtype[0])
    if not set(point.layout) & {"a", "s"}:
        point = replace(point, kv_cache_dtype=space.kv_cache_dtype[0])
    return point
