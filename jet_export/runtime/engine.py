"""Engines: one interface over the compiled packages and over the eager model that they are compared with.

An engine is stateless: every call takes the pools (in the order of `specs`) and updates them in place.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from jet_export.bundle import WEIGHTS, Limits, Manifest, check_files, check_host, torch_dtype
from jet_export.errors import JetExportError
from jet_export.model.cache import PackedBatch, StateSpec, state_specs
from jet_export.model.config import JetNemotronConfig
from jet_export.trt.flavors import FLAVORS

if TYPE_CHECKING:  # imports torch's compiler, a second's work that packages for a GPU do without
    from jet_export.model.jet_nemotron import JetNemotronForCausalLM


class Engine(ABC):
    """Runs one step over packed tokens. `config`, `limits` and `specs` say what it takes."""

    config: JetNemotronConfig
    limits: Limits
    specs: list[StateSpec]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        """input_ids [T] int64, logit_indices [M] int32 (rows of the packed tokens) -> logits [M, vocab]."""

    @abstractmethod
    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        """One token a sequence: input_ids [N] int64 -> logits [N, vocab]."""


class EagerEngine(Engine):
    """The PyTorch model behind the engine interface."""

    def __init__(
        self, model: JetNemotronForCausalLM, limits: Limits, kv_dtype: torch.dtype, state_dtype: torch.dtype
    ) -> None:
        self.model, self.config, self.limits = model, model.config, limits
        self.dtype, self.device = model.dtype, model.device
        self.specs = state_specs(model.config, model.dtype, kv_dtype, state_dtype)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        return self.model.forward_packed(input_ids, batch, states, logit_indices, decode=False).logits

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        return self.model.forward_packed(input_ids, batch, states, None, decode=True).logits


class Package:
    """One AOTInductor package, called with flat tensors.

    torch's own loader, `aoti_load_package`, compiles and runs test programs to tell what the CPU can do, and parses the
    package's call signature at every call; here the bundle's manifest has answered the first, and the second is fixed.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if device.type == "cpu":  # such a package calls the jet:: ops; one for a GPU holds their kernels
            import jet_export.model.jet_nemotron  # noqa: F401
        # run_single_threaded: otherwise a call synchronises the stream, which a CUDA graph cannot capture.
        self.loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)

    def load_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        """Point the package at `weights`, which the caller keeps alive. Raises JetExportError where one is missing."""
        names = {fqn: fqn.removeprefix("model.") for fqn in self.loader.get_constant_fqns()}
        missing = sorted(set(names.values()) - weights.keys())
        if missing:
            raise JetExportError(f"{path}: weight {missing[0]} is not in {WEIGHTS}.", "Build the bundle again.")
        constants = {fqn: weights[name].detach() for fqn, name in names.items()}  # tensors of ours over the same memory
        # torch never gives back its reference to a tensor that it does not manage: the memory would stay for good.
        weakref.finalize(self, let_go, list(constants.values())).atexit = False
        # use_inactive, check_full_update, user_managed. torch's wrapper of this call imports torch's compiler.
        self.loader.load_constants(constants, False, True, True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        (output,) = self.loader.boxed_run(list(inputs))
        return output


@torch.inference_mode()
def let_go(tensors: list[Tensor]) -> None:
    """Tensors without memory: what others hold of it stays."""
    for tensor in tensors:
        tensor.set_()  # type: ignore[call-overload]


class InductorEngine(Engine):
    """AOTInductor packages over one copy of the weights: prefill, decode, and on a GPU decode of one sequence."""

    def __init__(self, manifest: Manifest, weights: dict[str, Tensor], graphs: dict[str, Package]) -> None:
        self.config, self.limits, self.device = manifest.config, manifest.limits, manifest.device
        self.dtype = torch_dtype(manifest.dtype)
        self.specs = manifest_specs(manifest)
        self.weights, self.graphs = weights, graphs  # kept alive: the packages hold pointers into the weights

    @classmethod
    def open(cls, directory: Path, manifest: Manifest, weights: dict[str, Tensor]) -> InductorEngine:
        graphs = {}
        for mode, path in package_paths(directory).items():
            graphs[mode] = Package(path, manifest.device)
            graphs[mode].load_weights(weights, path)
        return cls(manifest, weights, graphs)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        return self.graphs["prefill"](input_ids, *batch, logit_indices, *states)

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        alone = len(input_ids) == 1 and "decode_one" in self.graphs
        return self.graphs["decode_one" if alone else "decode"](input_ids, *batch, *states)


def package_paths(directory: Path) -> dict[str, Path]:
    """A bundle's packages by mode; decode_one is not in a CPU's, nor in one of an earlier version."""
    paths = {mode: directory / f"{mode}.pt2" for mode in ("prefill", "decode", "decode_one")}
    return {mode: path for mode, path in paths.items() if mode != "decode_one" or path.is_file()}


def manifest_specs(m: Manifest) -> list[StateSpec]:
    return state_specs(m.config, torch_dtype(m.dtype), torch_dtype(m.kv_cache_dtype), torch_dtype(m.state_dtype))


def load_weights(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """weights.safetensors on the engine's device, tied parameters under both names."""
    weights = load_file(directory / WEIGHTS, device=str(manifest.device))
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    return weights


def load_engine(directory: str | Path, check: bool = True) -> tuple[Engine, Manifest]:
    """Load a bundle's engine. Raises JetExportError if the bundle is damaged or of another machine."""
    directory = Path(directory)
    manifest = Manifest.load(directory)
    backend = manifest.backend["name"]
    if check:
        check_host(directory, manifest)
    if backend in FLAVORS:
        from jet_export.trt.engine import TensorRTEngine

        if check:
            check_files(directory, manifest)
        return TensorRTEngine.open(directory, manifest), manifest
    if backend not in ("inductor", "onnx"):
        raise JetExportError(f"{directory}: backend {backend!r} is not known to this jet-export.")
    weights = checked_weights(directory, manifest) if check else load_weights(directory, manifest)
    if backend == "onnx":
        from jet_export.onnx_engine import OnnxEngine

        return OnnxEngine.open(directory, manifest, weights), manifest
    return InductorEngine.open(directory, manifest, weights), manifest


def checked_weights(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """`load_weights` while every file's hash is computed; what `check_files` says comes before any other error."""
    with ThreadPoolExecutor(1) as pool:
        files = pool.submit(check_files, directory, manifest)
        try:
            weights = load_weights(directory, manifest)
        finally:
            files.result()
    return weights


def load_eager(directory: str | Path, manifest: Manifest, weights: dict[str, Tensor] | None = None) -> EagerEngine:
    """The eager model that holds a bundle's own weights, FP8 layers included. `weights`: share a loaded copy."""
    from jet_export.model.jet_nemotron import empty_model

    weights = weights if weights is not None else load_weights(Path(directory), manifest)
    model = empty_model(manifest.config, torch_dtype(manifest.dtype), torch.device("meta"), manifest.limits.max_seq_len)
    if manifest.quantization:
        from jet_export.quantize import QuantizationReport, apply_report

        apply_report(model, QuantizationReport.from_dict(manifest.quantization))
    wanted = set(model.state_dict()) | {"cos_sin"}
    missing = sorted(wanted - weights.keys())
    if missing:
        raise JetExportError(f"{directory}: weight {missing[0]} is missing.", "Build the bundle again.")
    model.load_state_dict({k: v for k, v in weights.items() if k != "cos_sin" and k in wanted}, assign=True)
    if weights["lm_head.weight"] is weights["embed_tokens.weight"]:
        model.lm_head.weight = model.embed_tokens.weight  # one parameter, as in the model that was saved
    model.cos_sin = weights["cos_sin"]
    model.requires_grad_(False)
    return EagerEngine(model, manifest.limits, torch_dtype(manifest.kv_cache_dtype), torch_dtype(manifest.state_dtype))
