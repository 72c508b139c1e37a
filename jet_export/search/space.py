"""The search space: a TOML file, read and checked. docs/guides/search.md describes every key."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jet_export.model.config import LAYER_TYPES, JetDims, JetNemotronConfig
from jet_export.search.space_file import SpaceFile
from jet_export.utils.errors import JetExportError, shown
from jet_export.utils.files import DATA
from jet_export.utils.schema import parse, read_toml

T = TypeVar("T")

LETTERS = {"j": "jet", "a": "attn", "s": "swa"}
SPACES = DATA / "search"
SEE = "docs/guides/search.md describes the format."


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """A searched layout: the numbers of attn and swa layers to try."""

    attn: tuple[int, ...]
    swa: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Space:
    """The choices, their constraints, and how and where they are measured."""

    sizes: tuple[JetDims, ...]
    share: str | tuple[tuple[int, ...], ...]  # "all", "each", or groups of layers
    key_heads: tuple[int, ...] = (0,)  # of Gated DeltaNets; 0: the preset's
    fp8: tuple[bool, ...]
    state_dtype: tuple[str, ...]
    kv_cache_dtype: tuple[str, ...]  # "auto": the model dtype
    window_size: tuple[int, ...]
    layouts: tuple[str, ...] | LayerCounts  # a letter a layer
    cache_bytes: int | str | None  # "preset"; None: unbounded
    gpu_memory: int | str | None  # "device"
    parameters: tuple[float, float]
    decode_ms: float | None
    tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    batch: tuple[int, ...]
    context: tuple[int, ...]
    prefill_chunk: int
    new_tokens: int
    layers: int  # equal layers in an engine that measures a layer
    repeats: int  # measurements of a case; the fastest counts
    fill: str
    target_batch: int
    target_context: int
    slack_percent: float

    @property
    def groups(self) -> int:
        """How many JetBlock sizes a point may have; those of groups without a jet layer are unused."""
        return len(self.share) if isinstance(self.share, tuple) else 1

    def describe(self) -> dict[str, Any]:
        """JSON types only: recorded, and compared by --resume."""
        out: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            out[name] = [str(d) for d in value] if name == "sizes" else value
        if isinstance(self.layouts, LayerCounts):
            out["layouts"] = {"attn": self.layouts.attn, "swa": self.layouts.swa}
        if self.key_heads == (0,):
            del out["key_heads"]
        out["parameters"] = [x if math.isfinite(x) else None for x in self.parameters]  # JSON has no infinity
        return out


def layout_of(config: JetNemotronConfig) -> str:
    """A letter a layer."""
    letter = {kind: c for c, kind in LETTERS.items()}
    return "".join(letter[kind] for kind in config.layer_types)


def default_space(model: str, preset: JetNemotronConfig | None = None) -> Path:
    """The paper's table, except for jet-tiny and for presets of Gated DeltaNets."""
    if preset is not None and preset.jet_conv == "static":
        return SPACES / "gated-deltanet.toml"
    return SPACES / ("jet-tiny.toml" if model == "jet-tiny" else "paper.toml")


def read_space(path: Path, preset: JetNemotronConfig) -> Space:
    """Raises JetExportError naming the file, the key and what it takes."""
    return space_of(read_toml(path, f"--space {path}", SEE), path, preset)


def space_of(values: dict[str, Any], path: Path, preset: JetNemotronConfig) -> Space:
    """The space of these values, as tomllib gives them."""
    return _Reader(path, parse(SpaceFile, values, f"--space {path}", SEE)).space(preset)


def unique(items: Iterable[T]) -> tuple[T, ...]:
    """Without duplicates, in their order."""
    return tuple(dict.fromkeys(items))


class _Reader:
    """One file's tables, and what they mean for a preset."""

    def __init__(self, path: Path, file: SpaceFile) -> None:
        self.path, self.file = path, file

    def bad(self, what: str, todo: str = SEE) -> JetExportError:
        return JetExportError(f"--space {self.path}: {what}.", todo)

    def space(self, preset: JetNemotronConfig) -> Space:
        precision, constraints = self.file.precision, self.file.constraints
        measure, target = self.file.measure, self.file.target
        batch = unique(measure.batch)
        context = unique(measure.context or (min(4096, preset.max_position_embeddings),))
        target_batch, target_context = target.batch or max(batch), target.context or max(context)
        for key, value, grid in (("batch", target_batch, batch), ("context", target_context, context)):
            if value not in grid:
                raise self.bad(f"target.{key} {value} is not measured", f"Add it to measure.{key}.")
        return Space(
            sizes=self.sizes(preset),
            share=self.share(preset),
            key_heads=self.key_heads(preset),
            fp8=unique(precision.fp8),
            state_dtype=unique(precision.state_dtype),
            kv_cache_dtype=unique(precision.kv_cache_dtype),
            window_size=unique(self.file.attention.window_size or (preset.window_size,)),
            layouts=self.layouts(preset),
            cache_bytes=self.bound("cache_bytes", "preset"),
            gpu_memory=self.bound("gpu_memory", "device"),
            parameters=self.range(),
            decode_ms=constraints.decode_ms,
            tokens_per_s=constraints.tokens_per_s,
            prefill_tokens_per_s=constraints.prefill_tokens_per_s,
            batch=tuple(sorted(batch)),
            context=tuple(sorted(context)),
            prefill_chunk=measure.prefill_chunk,
            new_tokens=measure.new_tokens,
            layers=measure.layers,
            repeats=measure.repeats,
            fill=measure.fill,
            target_batch=target_batch,
            target_context=target_context,
            slack_percent=target.slack_percent,
        )

    def sizes(self, preset: JetNemotronConfig) -> tuple[JetDims, ...]:
        jet = self.file.jet
        axes = [key for key in ("head_k_dim", "head_v_dim", "num_heads") if getattr(jet, key)]
        if axes and jet.sizes:
            raise self.bad(f"jet.sizes and jet.{axes[0]} exclude each other")
        own = preset.jet_num_heads, preset.head_k_dim, preset.head_v_dim
        if axes:
            H, K, V = jet.num_heads or own[:1], jet.head_k_dim or own[1:2], jet.head_v_dim or own[2:]
            return unique(JetDims(h, k, v) for h, k, v in itertools.product(H, K, V))
        return unique(self.size(s, own) for s in jet.sizes or ("preset",))

    def size(self, text: str, own: tuple[int, int, int]) -> JetDims:
        if text == "preset":
            return JetDims(*own)
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
        if not found or not all(int(n) for n in found.groups()):
            raise self.bad(f"jet.sizes holds {shown(text)}", "It takes head_k_dim x head_v_dim x num_heads: 96x256x12.")
        K, V, H = map(int, found.groups())
        return JetDims(H, K, V)

    def share(self, preset: JetNemotronConfig) -> str | tuple[tuple[int, ...], ...]:
        value, n = self.file.jet.share, preset.num_hidden_layers
        if value == "all":
            return "all"
        if value == "each":
            return tuple((i,) for i in range(n))
        if not isinstance(value, list) or not all(isinstance(g, list) and g for g in value):
            raise self.bad(
                f"jet.share is {shown(value)}", 'It takes "all", "each", or groups of layers: [[0, 1], [2, 3]].'
            )
        layers = [i for group in value for i in group]
        if not all(type(i) is int and 0 <= i < n for i in layers) or len(set(layers)) != len(layers):
            raise self.bad("jet.share names a layer twice, or one that is not there", f"Layers are 0 to {n - 1}.")
        return tuple(tuple(group) for group in value)

    def key_heads(self, preset: JetNemotronConfig) -> tuple[int, ...]:
        """Layers of Gated DeltaNets are alike: their config.json has one size for all."""
        axis = self.file.jet.num_key_heads
        if preset.jet_conv == "dynamic":
            if axis:
                raise self.bad("jet.num_key_heads: JetBlocks share no key heads", "Leave it out.")
        elif "s" in self.letters(preset):
            raise self.bad("attention.layout: a Qwen3.5 has no sliding windows", "Take j and a, or counts of attn.")
        elif self.file.jet.share != "all":
            raise self.bad("jet.share: a Qwen3.5's Gated DeltaNets have one size for all", "Leave it out.")
        return unique(axis) or (0,)

    def letters(self, preset: JetNemotronConfig) -> set[str]:
        """Kinds of layers that the layouts have."""
        layouts = self.layouts(preset)
        if isinstance(layouts, LayerCounts):
            return {"j", "a", "s"} if any(layouts.swa) else {"j", "a"}
        return set("".join(layouts))

    def layouts(self, preset: JetNemotronConfig) -> tuple[str, ...] | LayerCounts:
        value, n = self.file.attention.layout, preset.num_hidden_layers
        if isinstance(value, dict):
            if set(value) - {"attn", "swa"}:
                raise self.bad("attention.layout counts attn and swa only")
            counts = {k: v if isinstance(v, list) else [v] for k, v in value.items()}
            for k, listed in counts.items():
                if not listed or not all(type(v) is int and 0 <= v <= n for v in listed):
                    raise self.bad(f"attention.layout.{k} is {shown(value[k])}", f"It takes counts from 0 to {n}.")
            own = layout_of(preset)
            attn = tuple(dict.fromkeys(counts.get("attn", [own.count("a")])))
            swa = tuple(dict.fromkeys(counts.get("swa", [own.count("s")])))
            if min(attn) + min(swa) > n:
                least = f"at least {min(attn)} attn and {min(swa)} swa layers"
                raise self.bad(f"attention.layout: {least} do not fit the model's {n}", "Ask for fewer.")
            return LayerCounts(attn=attn, swa=swa)
        out = []
        listed = value if isinstance(value, list) else [value]
        if not listed:
            raise self.bad("attention.layout is empty")
        for text in listed:
            if not isinstance(text, str):
                raise self.bad(f"attention.layout holds {shown(text)}", "It takes letters, a layer each, or counts.")
            letters = layout_of(preset) if text == "preset" else text
            if len(letters) != n or set(letters) - set(LETTERS):
                takes = ", ".join(f"{c} ({kind})" for c, kind in LETTERS.items())
                raise self.bad(f"attention.layout holds {shown(text)}", f"It takes {n} letters: {takes}.")
            out.append(letters)
        return tuple(dict.fromkeys(out))

    def bound(self, key: str, word: str) -> int | str | None:
        given = getattr(self.file.constraints, key)
        value = word if given is None else given
        if value in (word, "none"):
            return None if value == "none" else word
        if type(value) is not int or value <= 0:
            raise self.bad(f"constraints.{key} is {shown(value)}", f'It takes bytes, "{word}" or "none".')
        return value

    def range(self) -> tuple[float, float]:
        value = self.file.constraints.parameters
        ok = isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
        if not ok or not 0 <= value[0] <= value[1] or 1e300 < value[1] < math.inf:
            raise self.bad(f"constraints.parameters is {shown(value)}", "It takes [least, most].")
        return float(value[0]), float(value[1])


assert set(LETTERS.values()) == set(LAYER_TYPES)
