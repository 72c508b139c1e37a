"""FP8 models: which projections become Fp8Linear, a report of the choice, and rebuilding a model from its report.

    quantize_fp8:  nn.Linear -> calibrate -> Fp8Linear, in place, layer by layer; returns a QuantizationReport
    apply_report:  the same structure without weights, ready for a bundle's state dict

Names are those of published checkpoints, with our fused projections: `model.layers.7.mlp.gate_up_proj`, `lm_head`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jet_export.model.fp8 import ALIGNMENT, FP8, FP8_PROJECTIONS, Fp8Linear
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.quantization.calibrate import Progress, calibrate_projections, user_name
from jet_export.utils.errors import JetExportError


@dataclass
class QuantizationReport:
    """What is FP8, what is not and why, and the scales of an FP8 KV cache; part of a bundle's manifest."""

    fp8: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> weight_scale, input_scale
    kept: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    kv_scales: dict[str, tuple[float, float]] = field(default_factory=dict)  # attention layer -> k_scale, v_scale
    calibration_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; floats survive JSON exactly."""
        values = asdict(self)
        values["kept"] = [list(k) for k in self.kept]
        values["kv_scales"] = {name: list(s) for name, s in self.kv_scales.items()}
        return values

    def summary(self) -> list[str]:
        """What is FP8, and what is not and why; layers that differ only in their number share a line."""
        lines = [f"fp8: {', '.join(_grouped(self.fp8))}"] if self.fp8 else []
        for reason in dict.fromkeys(reason for _, reason in self.kept):
            lines.append(f"not fp8: {', '.join(_grouped(n for n, r in self.kept if r == reason))}: {reason}")
        return lines

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationReport:
        try:
            return cls(
                fp8={name: dict(scales) for name, scales in values["fp8"].items()},
                kept=[(name, reason) for name, reason in values["kept"]],
                kv_scales={name: (float(k), float(v)) for name, (k, v) in values["kv_scales"].items()},
                calibration_tokens=int(values["calibration_tokens"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise JetExportError(f"manifest.json: quantization is damaged ({e!r}).", "Build it again.") from None


def linear_paths(model: nn.Module) -> list[str]:
    """Module paths of every linear layer, quantised or not."""
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear | Fp8Linear)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def select(model: nn.Module, keep: Sequence[str], lm_head: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """(module paths to quantise, (name, reason) of the linears and the embedding that are kept).

    A pattern of `keep` is a name, the start of one up to a dot, or a glob of either; `*` matches dots too.
    Raises JetExportError for a pattern that matches nothing.
    """
    paths = linear_paths(model)
    for pattern in keep:
        if not any(_matches(user_name(p), pattern) for p in paths):
            example = user_name(next((p for p in paths if p.endswith("mlp.down_proj")), paths[0]))
            raise JetExportError(f"--keep {pattern}: matches no layer.", f"Layers are named like {example}.")
    chosen: list[str] = []
    kept = [("model.embed_tokens", "an embedding: rows are looked up, nothing is multiplied")]
    for path in paths:
        name, kind = user_name(path), path.rsplit(".", 1)[-1]
        matching = [pattern for pattern in keep if _matches(name, pattern)]
        if matching:
            kept.append((name, f"--keep {matching[0]}"))
        elif kind == "lm_head" and not lm_head:
            kept.append((name, "lm_head is quantised only on request"))
        elif kind not in (*FP8_PROJECTIONS, "lm_head"):
            kept.append((name, "small"))
        else:
            chosen.append(path)
    return chosen, kept


def check_shapes(model: nn.Module, paths: Sequence[str]) -> None:
    """Raises JetExportError naming the projections whose sizes FP8 matrix products do not support."""
    bad: dict[str, str] = {}
    for path in paths:
        m: Any = model.get_submodule(path)
        for what, size in (("output", m.out_features), ("input", m.in_features)):
            if size % ALIGNMENT:
                bad[user_name(path)] = f"{what} size {size}"
    if bad:
        name, size = next(iter(bad.items()))
        patterns = dict.fromkeys(_any_layer(n) if len(bad) > 1 else n for n in bad)
        more = f" (nor are {len(bad) - 1} other layers)" if len(bad) > 1 else ""
        raise JetExportError(
            f"{name}: {size} is not a multiple of {ALIGNMENT}, which FP8 needs{more}.",
            "Keep such layers in bf16: " + " ".join(f"--keep '{p}'" if "*" in p else f"--keep {p}" for p in patterns),
        )


def _grouped(names: Iterable[str]) -> list[str]:
    """Merge names that differ only in the layer's number, with a count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_any_layer(name), []).append(name)
    return [f"{pattern} ({len(same)})" if len(same) > 1 else same[0] for pattern, same in groups.items()]


def _any_layer(name: str) -> str:
    """model.layers.7.mlp.down_proj -> model.layers.*.mlp.down_proj"""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@torch.no_grad()
def quantize_fp8(
    model: JetNemotronForCausalLM,
    calibration: Sequence[Tensor],  # each [B, T] token ids
    *,
    keep: Sequence[str] = (),
    lm_head: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Replace every large projection by an Fp8Linear with scales calibrated by modelopt, in place.

    A tied lm_head becomes an FP8 copy of its own; the embedding is unchanged. Raises JetExportError, with nothing
    replaced, for a pattern that matches nothing, sizes that FP8 does not support, a layer without a usable scale, or
    a missing modelopt. Peak memory: the weights, an FP8 copy of them, and one layer's temporaries.
    """
    paths, kept = select(model, keep, lm_head)
    if not paths:
        raise JetExportError("--fp8: --keep leaves no layer to quantise.", "Keep fewer layers, or leave out --fp8.")
    if any(isinstance(model.get_submodule(p), Fp8Linear) for p in paths):
        raise JetExportError("--fp8: the model is FP8 already.", "Quantise a freshly loaded model.")
    check_shapes(model, paths)
    scales = calibrate_projections(model, paths, calibration, progress)
    report = QuantizationReport(kept=kept, calibration_tokens=sum(ids.numel() for ids in calibration))
    for path in paths:
        linear: Any = model.get_submodule(path)
        layer = Fp8Linear.from_linear(linear, scales[path].weight, scales[path].input)
        model.set_submodule(path, layer)
        buffers = {"weight_scale": layer.weight_scale, "input_scale": layer.input_scale}
        report.fp8[user_name(path)] = {name: scale.item() for name, scale in buffers.items()}
    check_all_fp8(model, report, keep, lm_head)
    return report


def kv_scales(model: JetNemotronForCausalLM) -> dict[str, tuple[float, float]]:
    """k_scale and v_scale of every attention layer, by module name."""
    attention: dict[str, Any] = {user_name(path): m for path, m in model.named_modules() if hasattr(m, "k_scale")}
    return {name: (m.k_scale, m.v_scale) for name, m in attention.items()}


def read_report(model: JetNemotronForCausalLM) -> QuantizationReport:
    """The report of a model whose checkpoint is FP8: nothing was calibrated here."""
    report = QuantizationReport()
    for path in linear_paths(model):
        layer = model.get_submodule(path)
        if isinstance(layer, Fp8Linear):
            scales = {"weight_scale": layer.weight_scale, "input_scale": layer.input_scale}
            report.fp8[user_name(path)] = {name: scale.item() for name, scale in scales.items()}
    if report.fp8:
        kept = [user_name(p) for p in linear_paths(model) if user_name(p) not in report.fp8]
        report.kept = [(name, "not FP8 in the checkpoint") for name in kept]
    return report


def apply_report(model: JetNemotronForCausalLM, report: QuantizationReport) -> None:
    """Give a fresh model (its weights may be empty, or on `meta`) the report's structure: empty Fp8Linear layers, to be
    filled by `load_state_dict`, and the scales of the KV cache."""
    paths = {user_name(path): path for path in linear_paths(model)}
    for name in report.fp8:
        linear = model.get_submodule(paths[name]) if name in paths else None
        if not isinstance(linear, nn.Linear):
            raise JetExportError(f"manifest.json: {name} is not a linear layer of this model.", "Build it again.")
        w, has_bias = linear.weight, linear.bias is not None
        empty = Fp8Linear.empty(linear.in_features, linear.out_features, has_bias, w.dtype, w.device)
        model.set_submodule(paths[name], empty)
    attention: dict[str, Any] = {user_name(path): m for path, m in model.named_modules() if hasattr(m, "k_scale")}
    for name, (k_scale, v_scale) in report.kv_scales.items():
        if name not in attention:
            raise JetExportError(f"manifest.json: {name} is not an attention layer of this model.", "Build it again.")
        attention[name].k_scale, attention[name].v_scale = k_scale, v_scale


def check_all_fp8(
    model: nn.Module, report: QuantizationReport, keep: Sequence[str] = (), lm_head: bool = False
) -> None:
    """Raises JetExportError naming a layer that should be FP8 and is not."""
    paths, _ = select(model, keep, lm_head)
    for path in paths:
        name = user_name(path)
        layer: Any = model.get_submodule(path)
        if not isinstance(layer, Fp8Linear) or layer.weight.dtype != FP8:
            raise JetExportError(f"{name}: should be FP8, and is {layer.weight.dtype}.", _REPORT_IT)
        for scale in (layer.weight_scale, layer.input_scale):
            if not (torch.isfinite(scale).all() and (scale > 0).all()):
                raise JetExportError(f"{name}: its FP8 scale is {scale.item():g}.", _REPORT_IT)
    wrong = {user_name(p) for p in paths} ^ report.fp8.keys()
    if wrong:
        raise JetExportError(f"{min(wrong)}: the report and the model disagree about its precision.", _REPORT_IT)


_REPORT_IT = "This is a defect of jet-export: please report it with the command."


class LayerRow(NamedTuple):
    name: str
    precision: str  # "fp8", or the parameter's dtype
    shape: tuple[int, ...]
    nbytes: int  # with bias and scales; 0 where another row counts them
    note: str  # why it is not FP8, or what it is tied to


def layer_table(model: nn.Module, report: QuantizationReport | None = None) -> list[LayerRow]:
    """One row per weight, in the model's order; works on `meta` too."""
    reasons = dict(report.kept) if report is not None else {}
    seen: set[int] = set()
    rows = []
    for path, module in model.named_modules():
        own = {n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        own = {n: t for n, t in own.items() if n not in module._non_persistent_buffers_set}
        whole = "weight" in own  # a layer is one row; other parameters have a row each
        for n, t in {"weight": own["weight"]}.items() if whole else own.items():
            name = user_name(path) if whole else f"{user_name(path)}.{n}"
            parts = own.values() if whole else [t]
            nbytes = sum(p.numel() * p.element_size() for p in parts if id(p) not in seen)
            note = "tied to model.embed_tokens" if id(t) in seen else reasons.get(name, "")
            seen.update(id(p) for p in parts)
            precision = "fp8" if t.dtype == FP8 else str(t.dtype).removeprefix("torch.")
            rows.append(LayerRow(name, precision, tuple(t.shape), nbytes, note))
    return rows
