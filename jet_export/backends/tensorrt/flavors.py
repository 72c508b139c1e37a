"""TensorRT and TensorRT for RTX, one API under two names: everything in which they differ stands here."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jet_export.plugins.targets import sm_name
from jet_export.utils.errors import JetExportError


@dataclass(frozen=True)
class Flavor:
    backend: str  # as --backend has it; the name of the package and of the extra too
    module: str  # what Python imports
    title: str
    minimum: tuple[int, int]
    needs_gpu: bool  # to build
    sms: tuple[int, ...] = ()  # that it builds for and runs on; empty: those of the GPUs it finds

    def version(self) -> str | None:
        """Of the installed package, or None."""
        try:
            return version(self.backend)
        except PackageNotFoundError:
            return None

    def require(self, what: str) -> str:
        """The installed version. Raises JetExportError where there is none, or one too old. `what` needs it."""
        found = self.version()
        pip = f"pip install 'jet-export[{self.backend}]'"
        if found is None or find_spec(self.module) is None:
            raise JetExportError(f"{what} needs {self.title}, which is not installed.", pip)
        if tuple(int(n) for n in found.split(".")[:2]) < self.minimum:
            least = ".".join(map(str, self.minimum))
            raise JetExportError(f"{what} needs {self.title} {least} or newer, this is {found}.", pip)
        return found

    def check_version(self, bundle: Path, built: str, again: str) -> None:
        """Raises JetExportError where a plan of version `built` is not for the one installed: plans are exact."""
        found = self.require(f"{bundle}")
        if found != built:
            raise JetExportError(
                f"{bundle}: built with {self.title} {built}, this is {found}.",
                f"{again}\nOr install the version that it was built with: pip install {self.backend}=={built}",
            )

    def load(self) -> Any:
        """The module. Raises ImportError."""
        return import_module(self.module)

    def check_sms(self, sms: tuple[int, ...]) -> None:
        """Raises JetExportError for an architecture that this TensorRT has no engines for."""
        wrong = [sm_name(sm) for sm in sms if self.sms and sm not in self.sms]
        if wrong:
            known = ", ".join(sm_name(sm) for sm in self.sms)
            raise JetExportError(
                f"--backend {self.backend}: {self.title} has no engines for SM {', '.join(wrong)} (it has {known}).",
                "Use --backend tensorrt on a machine with that GPU, or --backend inductor there.",
            )

    def set_targets(self, trt: Any, config: Any, sms: list[int]) -> None:
        """Name the architectures to an IBuilderConfig, RuntimeError for an unknown one. TensorRT has its GPU's."""
        if self.needs_gpu:
            return
        config.num_compute_capabilities = len(sms)
        for i, sm in enumerate(sms):
            target = getattr(trt.ComputeCapability, f"SM{sm}", None)
            if target is None or not config.set_compute_capability(target, i):
                raise RuntimeError(f"it has no engines for SM {sm_name(sm)}")

    def create_context(self, trt: Any, engine: Any, decode: bool) -> Any:
        """An IExecutionContext whose activation memory the caller gives.

        TensorRT for RTX compiles kernels for the shapes it sees, by default in the background, which would swap kernels
        under a captured graph and between two equal calls: here at once for decode, whose shapes are few, and never for
        prefill, whose shapes are many.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.needs_gpu:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if decode else kinds.NONE
        return engine.create_execution_context(config)

    @contextmanager
    def parser_environment(self):
        """Environment variables of a process that parses.

        The parser of TensorRT for RTX opens libtensorrt_rtx.so, the wheel holds libtensorrt_rtx.so.1 only; without the
        first name the process is aborted.
        """
        spec = find_spec("tensorrt_rtx_libs")
        if self.needs_gpu or spec is None or spec.origin is None:
            yield dict(os.environ)
            return
        libs = Path(spec.origin).parent
        with TemporaryDirectory(prefix="jet-export-") as folder:
            (Path(folder) / "libtensorrt_rtx.so").symlink_to(libs / "libtensorrt_rtx.so.1")
            old = os.environ.get("LD_LIBRARY_PATH")
            yield os.environ | {"LD_LIBRARY_PATH": ":".join([folder, str(libs), *([old] if old else [])])}


FLAVORS = {
    f.backend: f
    for f in (
        Flavor("tensorrt", "tensorrt", "TensorRT", (10, 14), needs_gpu=True),
        Flavor("tensorrt-rtx", "tensorrt_rtx", "TensorRT for RTX", (1, 2), False, (80, 86, 89, 120)),
    )
}
