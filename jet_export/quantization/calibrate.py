"""Calibration: the largest magnitudes that a model's projections, keys and values take on a sample text.

    amax(t) = max |t| over the calibration batches;   an FP8 tensor's scale is amax / 448

nvidia-modelopt observes weights and inputs of the projections (FP8_DEFAULT_CFG: per tensor, static). It wraps the
modules of a copy that shares every tensor with the model, so the model itself is not changed.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from jet_export.model.cache import states_per_layer
from jet_export.model.fp8 import FP8_MAX
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.utils.errors import JetExportError

Progress = Callable[[int, int], None]  # (batches done, batches in total)


class Scales(NamedTuple):
    """FP8 scales of one projection."""

    weight: float
    input: float


class Encoder(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> list[int]: ...


def user_name(path: str) -> str:
    """A module's name as published checkpoints, messages and --keep spell it."""
    return path if path == "lm_head" else f"model.{path}"


def read_calibration_text(path: str | Path) -> str:
    """A UTF-8 text file. Raises JetExportError if it is missing, empty or not UTF-8."""
    path = Path(path)
    todo = "--calibration takes a UTF-8 text file."
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise JetExportError(f"{path}: not UTF-8 (byte {e.start} is 0x{e.object[e.start]:02x}).", todo) from None
    except OSError as e:
        raise JetExportError(f"{path}: cannot be read ({e.strerror}).", todo) from None
    if not text.strip():
        raise JetExportError(f"{path}: empty.", todo)
    return text


def calibration_tokens(
    tokenizer: Encoder | None, text: str, *, vocab_size: int, seq_len: int = 512, windows: int = 8
) -> list[Tensor]:
    """`windows` tensors [1, seq_len] int64 spread evenly over the text; fewer or shorter where the text is short.

    Without a tokenizer, ids are the text's UTF-8 bytes modulo the vocabulary.
    """
    ids = tokenizer.encode(text) if tokenizer is not None else [b % vocab_size for b in text.encode("utf-8")]
    if not ids:
        raise JetExportError("calibration: the text has no tokens.", "--calibration takes a UTF-8 text file.")
    if max(ids) >= vocab_size:
        raise JetExportError(
            f"calibration: the tokenizer gives id {max(ids)}, the model has {vocab_size} tokens.",
            "Use the tokenizer that belongs to this model.",
        )
    count = min(windows, math.ceil(len(ids) / seq_len))
    last = max(len(ids) - seq_len, 0)
    starts = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return [torch.tensor([ids[s : s + seq_len]]) for s in starts]


def import_quantization() -> Any:
    """modelopt.torch.quantization, which takes seconds to import and is needed only to build FP8 engines."""
    try:
        with quiet():
            import modelopt.torch.quantization as mtq
    except ImportError as e:
        raise JetExportError(
            f"--fp8 needs nvidia-modelopt, which cannot be imported ({e}).", "pip install 'jet-export[fp8]'"
        ) from None
    return mtq


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what modelopt prints and its warnings."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def modelopt_config(mtq: Any, names: Sequence[str]) -> dict[str, Any]:
    """FP8_DEFAULT_CFG with exactly the named modules enabled, including those that its own patterns exclude."""
    config: dict[str, Any] = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    wanted = {"*weight_quantizer": "weight_quantizer", "*input_quantizer": "input_quantizer"}
    formats = {e["quantizer_name"]: e["cfg"] for e in config["quant_cfg"] if e["quantizer_name"] in wanted}
    config["quant_cfg"].append({"quantizer_name": "*", "enable": False})
    for name in names:
        for pattern, quantizer in wanted.items():
            config["quant_cfg"].append({"quantizer_name": f"{name}.{quantizer}", "cfg": formats[pattern]})
    return config


@torch.no_grad()
def calibrated_copy(
    model: JetNemotronForCausalLM, names: Sequence[str], calibration: Sequence[Tensor], progress: Progress | None = None
) -> nn.Module:
    """A copy of the module tree over the same tensors, with the named linears fake-quantised by modelopt."""
    mtq = import_quantization()
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    shell = copy.deepcopy(model, shared)
    for name in names:
        shell.get_submodule(name).register_forward_pre_hook(_finite_input(name))
    out, err = sys.stdout, sys.stderr

    def forward_loop(m: nn.Module) -> None:
        for i, ids in enumerate(calibration):
            m(ids.to(model.device))
            if progress is not None:
                with redirect_stdout(out), redirect_stderr(err):
                    progress(i + 1, len(calibration))

    with quiet():
        mtq.quantize(shell, modelopt_config(mtq, names), forward_loop)
    return shell


def _finite_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.isfinite(args[0]).all():
            raise JetExportError(
                f"{user_name(name)}: its input is not finite on the calibration text.",
                "Check the checkpoint, or calibrate on another text: --calibration FILE",
            )

    return hook


@torch.no_grad()
def calibrate_projections(
    model: JetNemotronForCausalLM, names: Sequence[str], calibration: Sequence[Tensor], progress: Progress | None = None
) -> dict[str, Scales]:
    """Scales of the named nn.Linear modules. Raises JetExportError naming a layer that has none."""
    for name in names:
        weight: Any = model.get_submodule(name).weight
        _check_amax(weight.abs().amax(), user_name(name), "weight")
    shell = calibrated_copy(model, names, calibration, progress)
    scales = {}
    for name in names:
        layer: Any = shell.get_submodule(name)
        scales[name] = Scales(
            _check_amax(layer.weight_quantizer.amax, user_name(name), "weight") / FP8_MAX,
            _check_amax(layer.input_quantizer.amax, user_name(name), "input") / FP8_MAX,
        )
    del shell, layer
    gc.collect()  # modelopt's wrappers form cycles, which keep the weights alive
    return scales


def _check_amax(amax: Any, name: str, what: str) -> float:
    value = math.nan if amax is None else float(amax)  # a tensor; None if no batch reached the module
    if not math.isfinite(value) or value == 0:
        found = "was never seen" if amax is None else f"has a largest magnitude of {value:g}"
        raise JetExportError(
            f"{name}: its {what} {found} in calibration, so it has no FP8 scale.",
            f"Check the checkpoint, calibrate on another text, or keep this layer in bf16: --keep {name}",
        )
    return value


@torch.no_grad()
def calibrate_kv_scales(
    model: JetNemotronForCausalLM, calibration: Sequence[Tensor], progress: Progress | None = None
) -> dict[str, tuple[float, float]]:
    """Set k_scale and v_scale of every attention layer for an FP8 KV cache, and return them by module name.

    Keys (after RoPE) and values are read from a cache in the model dtype, whose unused positions are zero. Call it
    after `quantize_fp8`, to measure the FP8 model's keys and values.
    """
    kinds = model.config.layer_types
    amax = {i: torch.zeros(2, device=model.device) for i, kind in enumerate(kinds) if kind != "jet"}
    for step, ids in enumerate(calibration):
        cache = model.new_cache(*ids.shape)
        model(ids.to(model.device), cache=cache)
        for i, states in enumerate(states_per_layer(model.config, cache.states)):
            if i in amax:  # [pages, 2, Hkv, page, Dh]
                amax[i] = torch.maximum(amax[i], states[0].abs().amax(dim=(0, 2, 3, 4)).float())
        if progress is not None:
            progress(step + 1, len(calibration))
    scales = {}
    for i, kv in amax.items():
        name = user_name(f"layers.{i}.self_attn")
        module: Any = model.layers[i].self_attn
        k_amax, v_amax = kv.tolist()
        module.k_scale = _check_kv(k_amax, name, "keys") / FP8_MAX
        module.v_scale = _check_kv(v_amax, name, "values") / FP8_MAX
        scales[name] = (module.k_scale, module.v_scale)
    return scales


def _check_kv(value: float, name: str, what: str) -> float:
    if not math.isfinite(value) or value == 0:
        raise JetExportError(
            f"{name}: its {what} have a largest magnitude of {value:g} in calibration, so they have no FP8 scale.",
            "Check the checkpoint, or keep the KV cache in the model's dtype: leave out --kv-cache-dtype fp8",
        )
    return value
