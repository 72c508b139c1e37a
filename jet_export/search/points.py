"""A point of the space: sizes, layout and precisions, and the architecture that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from jet_export.bundle.dtypes import Dtypes, torch_dtype
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.search.space import LETTERS, LayerCounts, Space, layout_of
from jet_export.utils.errors import JetExportError

MAX_COUNTED_LAYOUTS = 4096  # above which count_points returns a bound


@dataclass(frozen=True, kw_only=True)
class Point:
    """One choice of everything that the space leaves open."""

    sizes: tuple[JetDims, ...]  # one for each group of `space.share` that has a jet layer
    layout: str  # a letter a layer
    window_size: int
    fp8: bool
    state_dtype: str
    kv_cache_dtype: str  # "auto" or "fp8"
    key_heads: int = 0  # of Gated DeltaNets; 0: the preset's

    def dtypes(self, model: torch.dtype) -> Dtypes:
        """Of an engine whose model dtype is `model`."""
        kv_cache = model if self.kv_cache_dtype == "auto" else torch_dtype(self.kv_cache_dtype)
        return Dtypes(model=model, kv_cache=kv_cache, state=torch_dtype(self.state_dtype))

    def config(self, preset: JetNemotronConfig, space: Space) -> JetNemotronConfig:
        """Raises JetExportError if the kernels cannot compute it, or a jet layer is in no group."""
        shared = self.key_heads or preset.jet_num_key_heads
        base = replace(
            preset,
            layer_types=tuple(LETTERS[c] for c in self.layout),
            window_size=self.window_size if "s" in self.layout else preset.window_size,
            jet_layers=(),
            jet_num_key_heads=min(shared, 1),  # fits any number of heads, which come next
        )
        return replace(base.with_jet_dims(self.jet_dims(space)), jet_num_key_heads=shared)

    def jet_dims(self, space: Space) -> dict[int, JetDims]:
        """By layer. Raises JetExportError for a jet layer in no group."""
        groups = used_groups(self.layout, space).values()
        dims = {i: d for d, layers in zip(self.sizes, groups, strict=True) for i in layers}
        for i, c in enumerate(self.layout):
            if c == "j" and i not in dims:
                raise JetExportError(f"layer {i} is a jet layer and in no group of jet.share")
        return dims

    def label(self, space: Space, preset: JetNemotronConfig) -> str:
        """A short name, unique in this space."""
        words = [run_lengths([str(d) for d in self.sizes]) or "attention"]
        words += [f"key heads {self.key_heads}"] if len(space.key_heads) > 1 and self.sizes else []
        words += ["fp8" if self.fp8 else "bf16"] if len(space.fp8) > 1 or self.fp8 else []
        words += [f"state {short_dtype(self.state_dtype)}"] if len(space.state_dtype) > 1 else []
        words += [f"kv {self.kv_cache_dtype}"] if len(space.kv_cache_dtype) > 1 else []
        words += [f"window {self.window_size}"] if len(space.window_size) > 1 else []
        words += [self.layout] if self.layout != layout_of(preset) or isinstance(space.layouts, LayerCounts) else []
        return " ".join(words)


def run_lengths(words: list[str]) -> str:
    """a, a, b -> "2*a+b"; a, a -> "a"."""
    runs = [(word, len(list(run))) for word, run in itertools.groupby(words)]
    return "+".join(word if n in (1, len(words)) else f"{n}*{word}" for word, n in runs)


def short_dtype(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype)


def used_groups(layout: str, space: Space) -> dict[int, tuple[int, ...]]:
    """The jet layers of each group of `space.share` that has any."""
    groups = space.share if isinstance(space.share, tuple) else (range(len(layout)),)
    jets = {g: tuple(i for i in layers if layout[i] == "j") for g, layers in enumerate(groups)}
    return {g: layers for g, layers in jets.items() if layers}


def feasible_counts(counts: LayerCounts, layers: int) -> list[tuple[int, int]]:
    """Pairs of numbers of attn and swa layers that fit a model of `layers` layers."""
    return [(a, s) for a, s in itertools.product(counts.attn, counts.swa) if a + s <= layers]


def placements(counts: LayerCounts, layers: int) -> Iterator[str]:
    """Every placement of every allowed number of attn and swa layers."""
    for attn, swa in feasible_counts(counts, layers):
        for a in itertools.combinations(range(layers), attn):
            rest = [i for i in range(layers) if i not in a]
            for s in itertools.combinations(rest, swa):
                yield "".join("a" if i in a else "s" if i in s else "j" for i in range(layers))


def all_layouts(space: Space, layers: int) -> Iterator[str]:
    return placements(space.layouts, layers) if isinstance(space.layouts, LayerCounts) else iter(space.layouts)


def count_points(space: Space, preset: JetNemotronConfig) -> int:
    """How many points all_points yields; an upper bound above MAX_COUNTED_LAYOUTS layouts."""
    n = preset.num_hidden_layers

    def per_layout(*, attn: int, swa: int, groups: int) -> int:
        window = len(space.window_size) if swa else 1
        state = len(space.state_dtype) if attn + swa < n else 1
        kv = len(space.kv_cache_dtype) if attn + swa else 1
        sizes: int = len(space.sizes) ** groups * (len(space.key_heads) if groups else 1)
        return len(space.fp8) * window * state * kv * sizes

    if isinstance(space.layouts, LayerCounts):
        pairs = [(a, s, math.comb(n, a) * math.comb(n - a, s)) for a, s in feasible_counts(space.layouts, n)]
        if sum(times for *_, times in pairs) > MAX_COUNTED_LAYOUTS:
            return sum(times * per_layout(attn=a, swa=s, groups=min(space.groups, n - a - s)) for a, s, times in pairs)
    return sum(
        per_layout(attn=x.count("a"), swa=x.count("s"), groups=len(used_groups(x, space)))
        for x in all_layouts(space, n)
    )


def all_points(space: Space, preset: JetNemotronConfig) -> Iterator[Point]:
    """Every point once, in canonical form."""
    seen: set[Point] = set()
    for layout in all_layouts(space, preset.num_hidden_layers):
        axes = (space.window_size, space.fp8, space.state_dtype, space.kv_cache_dtype, space.key_heads)
        for sizes in itertools.product(space.sizes, repeat=len(used_groups(layout, space))):
            for window, fp8, state, kv, shared in itertools.product(*axes):
                point = Point(
                    sizes=sizes,
                    layout=layout,
                    window_size=window,
                    fp8=fp8,
                    state_dtype=state,
                    kv_cache_dtype=kv,
                    key_heads=shared,
                )
                point = canonical(point, space)
                if point not in seen:
                    seen.add(point)
                    yield point


def canonical(point: Point, space: Space) -> Point:
    """The point with every choice that its layout does not use set to the space's first."""
    if "s" not in point.layout:
        point = replace(point, window_size=space.window_size[0])
    if "j" not in point.layout:
        point = replace(point, state_dtype=space.state_dtype[0], key_heads=space.key_heads[0])
    if not set(point.layout) & {"a", "s"}:
        point = replace(point, kv_cache_dtype=space.kv_cache_dtype[0])
    return point
