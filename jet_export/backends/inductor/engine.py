"""AOTInductor packages behind the engine interface."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.modes import FEW_ROWS, MAX_FEW_ROWS, MODES, MTP_DECODE, MTP_PREFILL, ONE_ROW, VERIFY
from jet_export.bundle.manifest import WEIGHTS, Manifest
from jet_export.model.cache import PackedBatch
from jet_export.utils.errors import JetExportError


class Package:
    """One AOTInductor package, called with flat tensors.

    torch's own loader, `aoti_load_package`, compiles and runs test programs to find out what the CPU supports, and
    parses the package's call signature at every call. Here the manifest was checked, and the signature is fixed.
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
        constants = {fqn: weights[name].detach() for fqn, name in names.items()}  # our own tensors over the same memory
        # torch never drops its reference to a tensor that it does not manage: the memory would never be freed.
        weakref.finalize(self, release, list(constants.values())).atexit = False
        # use_inactive, check_full_update, user_managed. torch's wrapper of this call would import torch's compiler.
        self.loader.load_constants(constants, False, True, True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        (output,) = self.run(*inputs)
        return output

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs."""
        outputs: list[Tensor] = self.loader.boxed_run(list(inputs))
        return outputs


@torch.inference_mode()
def release(tensors: list[Tensor]) -> None:
    """Detach the tensors from their memory, which is freed unless another tensor holds it."""
    for tensor in tensors:
        tensor.set_()  # type: ignore[call-overload]


class InductorEngine(Engine):
    """AOTInductor packages over one copy of the weights: prefill, decode, and on a GPU decode of one sequence."""

    def __init__(self, manifest: Manifest, weights: dict[str, Tensor], graphs: dict[str, Package]) -> None:
        self.config, self.limits, self.device = manifest.config, manifest.limits, manifest.device
        self.dtype, self.dependent_launch = manifest.dtypes.model, manifest.dependent_launch
        self.specs = manifest.dtypes.specs(manifest.config)
        self.state_interval, self.rollback, self.mtp = manifest.state_interval, manifest.rollback, manifest.mtp
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
        return self.graphs[self.decode_mode(len(input_ids))](input_ids, *batch, *states)

    @torch.inference_mode()
    def verify(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        if VERIFY not in self.graphs:
            return super().verify(input_ids, batch, states)
        return self.graphs[VERIFY](input_ids, *batch, *states)

    @torch.inference_mode()
    def predict(
        self, input_ids: Tensor, hidden: Tensor, batch: PackedBatch, logit_indices: Tensor | None, kv_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self.mtp:
            return super().predict(input_ids, hidden, batch, logit_indices, kv_cache)
        indices = () if logit_indices is None else (logit_indices,)
        package = self.graphs[MTP_PREFILL if indices else MTP_DECODE]
        logits, ahead = package.run(input_ids, hidden, *batch[:4], *indices, kv_cache)
        return logits, ahead

    def decode_mode(self, rows: int) -> str:
        """The package that decodes so many sequences: the narrowest."""
        if rows == 1 and ONE_ROW in self.graphs:
            return ONE_ROW
        return FEW_ROWS if rows <= MAX_FEW_ROWS and FEW_ROWS in self.graphs else "decode"


def package_paths(directory: Path) -> dict[str, Path]:
    """A bundle's packages by mode; not every one has more than prefill and decode."""
    names = (*MODES, ONE_ROW, FEW_ROWS, VERIFY, MTP_PREFILL, MTP_DECODE)
    paths = {mode: directory / f"{mode}.pt2" for mode in names}
    return {mode: path for mode, path in paths.items() if mode in MODES or path.is_file()}
