"""The search space: a TOML file, read and checked. docs/guides/search.md describes every key."""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_export.model.config import LAYER_TYPES, JetDims, JetNemotronConfig
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import DATA

LETTERS = {"j": "jet", "a": "attn", "s": "swa"}
MAX_INT = 2**31 - 1
SPACES = DATA / "search"
KEYS: dict[str, set[str]] = {
    "jet": {"sizes", "head_k_dim", "head_v_dim", "num_heads", "share"},
    "precision": {"fp8", "state_dtype", "kv_cache_dtype"},
    "attention": {"window_size", "layout"},
    "constraints": {"cache_bytes", "gpu_memory", "parameters", "decode_ms", "tokens_per_s", "prefill_tokens_per_s"},
    "measure": {"batch", "context", "prefill_chunk", "new_tokens", "layers", "repeats", "fill"},
    "target": {"batch", "context", "slack_percent"},
}


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
        out["parameters"] = [x if math.isfinite(x) else None for x in self.parameters]  # JSON has no infinity
        return out


def layout_of(config: JetNemotronConfig) -> str:
    """A letter a layer."""
    letter = {kind: c for c, kind in LETTERS.items()}
    return "".join(letter[kind] for kind in config.layer_types)


def default_space(model: str) -> Path:
    """The paper's table, except for jet-tiny."""
    return SPACES / ("jet-tiny.toml" if model == "jet-tiny" else "paper.toml")


def read_space(path: Path, preset: JetNemotronConfig) -> Space:
    """Raises JetExportError naming the file, the key and what it takes."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JetExportError(f"--space {path}: no such file.", "docs/guides/search.md describes the format.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        raise JetExportError(
            f"--space {path}: not valid TOML: {e}.", "docs/guides/search.md describes the format."
        ) from None
    try:
        return _Reader(path, values).space(preset)
    except OverflowError:
        raise JetExportError(
            f"--space {path}: a number is too large.", "docs/guides/search.md describes the format."
        ) from None


class _Reader:
    """One file's values, each checked where it is read."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        for section, keys in values.items():
            if section not in KEYS:
                raise self.bad(f"[{section}] is not known", f"Known: {', '.join(KEYS)}.")
            if not isinstance(keys, dict):
                raise self.bad(f"{section} is not a table")
            for key in keys:
                if key not in KEYS[section]:
                    raise self.bad(f"{section}.{key} is not known", f"Known: {', '.join(sorted(KEYS[section]))}.")

    def bad(self, what: str, todo: str = "docs/guides/search.md describes the format.") -> JetExportError:
        return JetExportError(f"--space {self.path}: {what}.", todo)

    def get(self, section: str, key: str, default: Any = None) -> Any:
        return self.values.get(section, {}).get(key, default)

    def many(
        self, section: str, key: str, default: list[Any], kind: type, known: tuple[Any, ...] = ()
    ) -> tuple[Any, ...]:
        """A value or a list of values, without duplicates."""
        value = self.get(section, key, default)
        listed: list[Any] = value if isinstance(value, list) else [value]
        for v in listed:
            out_of_range = isinstance(v, int) and kind is int and not 1 <= v <= MAX_INT
            if type(v) is not kind or (known and v not in known) or out_of_range:
                of = f" of at least 1, at most {MAX_INT}" if kind is int else ""
                takes = ", ".join(map(str, known)) or f"{kind.__name__}s{of}"
                raise self.bad(f"{section}.{key} holds {v!r}", f"It takes {takes}.")
        if not listed:
            raise self.bad(f"{section}.{key} is empty")
        return tuple(dict.fromkeys(listed))

    def number(self, section: str, key: str, default: float | None) -> float | None:
        value = self.get(section, key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.bad(f"{section}.{key} is {value!r}, not a number of at least 0")
        return value

    def one(self, section: str, key: str, default: Any, kind: type, known: tuple[Any, ...] = ()) -> Any:
        value = self.get(section, key)
        if isinstance(value, list):
            raise self.bad(f"{section}.{key} is {value!r}", "It takes one value, not a list.")
        return self.many(section, key, [default], kind, known)[0]

    def count(self, section: str, key: str, default: int, least: int = 1) -> int:
        value: int = self.one(section, key, default, int)
        if value < least:
            raise self.bad(f"{section}.{key} is {value}", f"It takes at least {least}.")
        return value

    def space(self, preset: JetNemotronConfig) -> Space:
        batch = self.many("measure", "batch", [1], int)
        context = self.many("measure", "context", [min(4096, preset.max_position_embeddings)], int)
        target_batch = self.count("target", "batch", max(batch))
        target_context = self.count("target", "context", max(context))
        for key, value, grid in (("batch", target_batch, batch), ("context", target_context, context)):
            if value not in grid:
                raise self.bad(f"target.{key} {value} is not measured", f"Add it to measure.{key}.")
        return Space(
            sizes=self.sizes(preset),
            share=self.share(preset),
            fp8=self.many("precision", "fp8", [False], bool),
            state_dtype=self.many("precision", "state_dtype", ["float32"], str, ("float32", "bfloat16")),
            kv_cache_dtype=self.many("precision", "kv_cache_dtype", ["auto"], str, ("auto", "fp8")),
            window_size=self.windows(preset),
            layouts=self.layouts(preset),
            cache_bytes=self.bound("cache_bytes", "preset"),
            gpu_memory=self.bound("gpu_memory", "device"),
            parameters=self.range(),
            decode_ms=self.number("constraints", "decode_ms", None),
            tokens_per_s=self.number("constraints", "tokens_per_s", None),
            prefill_tokens_per_s=self.number("constraints", "prefill_tokens_per_s", None),
            batch=tuple(sorted(batch)),
            context=tuple(sorted(context)),
            prefill_chunk=self.count("measure", "prefill_chunk", 2048),
            new_tokens=self.count("measure", "new_tokens", 64, least=2),  # one step is dropped
            layers=self.count("measure", "layers", 2),
            repeats=self.count("measure", "repeats", 3),
            fill=self.one("measure", "fill", "auto", str, ("auto", "prefill", "synthetic")),
            target_batch=target_batch,
            target_context=target_context,
            slack_percent=float(self.number("target", "slack_percent", 3.0) or 0.0),
        )

    def sizes(self, preset: JetNemotronConfig) -> tuple[JetDims, ...]:
        axes = [key for key in ("head_k_dim", "head_v_dim", "num_heads") if self.get("jet", key) is not None]
        if axes and self.get("jet", "sizes") is not None:
            raise self.bad(f"jet.sizes and jet.{axes[0]} exclude each other")
        own = preset.jet_num_heads, preset.head_k_dim, preset.head_v_dim
        if axes:
            K = self.many("jet", "head_k_dim", [own[1]], int)
            V = self.many("jet", "head_v_dim", [own[2]], int)
            H = self.many("jet", "num_heads", [own[0]], int)
            if max(*K, *V, *H) > 999_999:
                raise self.bad("a jet size is over 999,999")
            return tuple(JetDims(h, k, v) for h, k, v in itertools.product(H, K, V))
        return tuple(dict.fromkeys(self.size(s, own) for s in self.many("jet", "sizes", ["preset"], str)))

    def size(self, text: str, own: tuple[int, int, int]) -> JetDims:
        if text == "preset":
            return JetDims(*own)
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
        if not found or not all(int(n) for n in found.groups()):
            raise self.bad(f"jet.sizes holds {text!r}", "It takes head_k_dim x head_v_dim x num_heads: 96x256x12.")
        K, V, H = map(int, found.groups())
        return JetDims(H, K, V)

    def share(self, preset: JetNemotronConfig) -> str | tuple[tuple[int, ...], ...]:
        value, n = self.get("jet", "share", "all"), preset.num_hidden_layers
        if value == "all":
            return "all"
        if value == "each":
            return tuple((i,) for i in range(n))
        if not isinstance(value, list) or not all(isinstance(g, list) and g for g in value):
            raise self.bad(f"jet.share is {value!r}", 'It takes "all", "each", or groups of layers: [[0, 1], [2, 3]].')
        layers = [i for group in value for i in group]
        if not all(type(i) is int and 0 <= i < n for i in layers) or len(set(layers)) != len(layers):
            raise self.bad("jet.share names a layer twice, or one that is not there", f"Layers are 0 to {n - 1}.")
        return tuple(tuple(group) for group in value)

    def windows(self, preset: JetNemotronConfig) -> tuple[int, ...]:
        value = self.get("attention", "window_size", "preset")
        if value == "preset":
            return (preset.window_size,)
        return self.many("attention", "window_size", [], int)

    def layouts(self, preset: JetNemotronConfig) -> tuple[str, ...] | LayerCounts:
        value, n = self.get("attention", "layout", "preset"), preset.num_hidden_layers
        if isinstance(value, dict):
            if set(value) - {"attn", "swa"}:
                raise self.bad("attention.layout counts attn and swa only")
            counts = {k: v if isinstance(v, list) else [v] for k, v in value.items()}
            for k, listed in counts.items():
                if not listed or not all(type(v) is int and 0 <= v <= n for v in listed):
                    raise self.bad(f"attention.layout.{k} is {value[k]!r}", f"It takes counts from 0 to {n}.")
            own = layout_of(preset)
            attn = tuple(dict.fromkeys(counts.get("attn", [own.count("a")])))
            swa = tuple(dict.fromkeys(counts.get("swa", [own.count("s")])))
            if min(attn) + min(swa) > n:
                least = f"at least {min(attn)} attn and {min(swa)} swa layers"
                raise self.bad(f"attention.layout: {least} do not fit the model's {n}", "Ask for fewer.")
            return LayerCounts(attn=attn, swa=swa)
        out = []
        for text in self.many("attention", "layout", ["preset"], str):
            letters = layout_of(preset) if text == "preset" else text
            if len(letters) != n or set(letters) - set(LETTERS):
                takes = ", ".join(f"{c} ({kind})" for c, kind in LETTERS.items())
                raise self.bad(f"attention.layout holds {text!r}", f"It takes {n} letters: {takes}.")
            out.append(letters)
        return tuple(dict.fromkeys(out))

    def bound(self, key: str, word: str) -> int | str | None:
        value = self.get("constraints", key, word)
        if value in (word, "none"):
            return None if value == "none" else word
        if type(value) is not int or value <= 0:
            raise self.bad(f"constraints.{key} is {value!r}", f'It takes bytes, "{word}" or "none".')
        return value

    def range(self) -> tuple[float, float]:
        value = self.get("constraints", "parameters", [0, math.inf])
        ok = isinstance(value, list) and len(value) == 2
        if not ok or not all(isinstance(v, int | float) for v in value) or not value[0] <= value[1]:
            raise self.bad(f"constraints.parameters is {value!r}", "It takes [least, most].")
        return float(value[0]), float(value[1])


assert set(LETTERS.values()) == set(LAYER_TYPES)
