"""TensorRT and TensorRT for RTX: one API in two packages. All differences between them are in this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One of the two TensorRTs."""

    backend: str  # for --backend; also the name of the Python package and of our extra
    module: str  # what Python imports
    title: str
    minimum: tuple[int, int]
    needs_gpu: bool  # to build
    sms: tuple[int, ...] = ()  # that it builds for and runs on; empty: those of the GPUs it finds

    def version(self) -> str | None:
        """The installed package's version, or None."""
        try:
            return version(self.backend)
        except PackageNotFoundError:
            return None

    def require(self, what: str) -> str:
        """The installed version. Raises JetExportError, naming `what` needs it, where there is none or one too old."""
        found = self.version()
        pip = f"pip install 'jet-export[{self.backend}]'"
        if found is None or find_spec(self.module) is None:
            raise JetExportError(f"{what} needs {self.title}, which is not installed.", pip)
        if tuple(int(n) for n in found.split(".")[:2]) < self.minimum:
            least = ".".join(map(str, self.minimum))
            raise JetExportError(f"{what} needs {self.title} {least} or newer, this is {found}.", pip)
        return found

    def check_version(self, bundle: Path, built: str, again: str) -> None:
        """Raises JetExportError unless `built` is the installed version: a plan loads in no other."""
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
        """Raises JetExportError for an architecture that this TensorRT does not support."""
        wrong = [sm_name(sm) for sm in sms if self.sms and sm not in self.sms]
        if wrong:
            known = ", ".join(sm_name(sm) for sm in self.sms)
            raise JetExportError(
                f"--backend {self.backend}: {self.title} has no engines for SM {', '.join(wrong)} (it has {known}).",
                "Use --backend tensorrt on a machine with that GPU, or --backend inductor there.",
            )

    def set_targets(self, trt: Any, config: Any, sms: list[int]) -> None:
        """Set an IBuilderConfig's architectures; TensorRT always builds for its GPU. Raises RuntimeError for an unknown
        one."""
        if self.needs_gpu:
            return
        config.num_compute_capabilities = len(sms)
        for i, sm in enumerate(sms):
            target = getattr(trt.ComputeCapability, f"SM{sm}", None)
            if target is None or not config.set_compute_capability(target, i):
                raise RuntimeError(f"it has no engines for SM {sm_name(sm)}")

    def create_context(self, trt: Any, engine: Any, decode: bool) -> Any:
        """An IExecutionContext whose activation memory the caller provides.

        TensorRT for RTX specialises kernels for the shapes it sees, by default in the background, which would change
        kernels under a captured graph and between equal calls. Here it does so eagerly for decode, which has few
        shapes, and never for prefill, which has many.
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
    def parser_environment(self) -> Iterator[dict[str, str]]:
        """The environment variables of a process that parses.

        The parser of TensorRT for RTX opens libtensorrt_rtx.so, but the wheel has only libtensorrt_rtx.so.1; without a
        link the process aborts.
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
        Flavor(backend="tensorrt", module="tensorrt", title="TensorRT", minimum=(10, 14), needs_gpu=True),
        Flavor(
            backend="tensorrt-rtx",
            module="tensorrt_rtx",
            title="TensorRT for RTX",
            minimum=(1, 2),
            needs_gpu=False,
            sms=(80, 86, 89, 120),
        ),
    )
}
