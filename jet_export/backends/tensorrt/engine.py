"""A TensorRT plan behind the engine interface: two execution contexts, one per profile, over the caller's tensors.

Every state's input and output are bound to one address, which the plugins update in place. Addresses and shapes are set
only when they differ from the last call's. Nothing synchronises, so a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.graph import feeds
from jet_export.backends.tensorrt.builder import PLAN
from jet_export.backends.tensorrt.flavors import FLAVORS, Flavor
from jet_export.backends.tensorrt.profiles import NAMES
from jet_export.bundle.manifest import Manifest, rebuild_hint
from jet_export.model.cache import PackedBatch
from jet_export.plugins.library import NAME as LIBRARY
from jet_export.utils.errors import JetExportError

log = logging.getLogger(__name__)
DTYPES = {
    torch.float32: "FLOAT",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "FP8",
    torch.int32: "INT32",
    torch.int64: "INT64",
}  # of trt.DataType
KEPT_ERRORS = 8


def make_logger(trt: Any) -> Any:
    """Forwards TensorRT's messages to logging, and keeps the last errors for exceptions."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]  # trt is Any
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=KEPT_ERRORS)

        def log(self, severity: Any, text: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.errors.append(text)
            log.log(level, text)

    return Logger()


class Context:
    """The execution context of one profile, and what is bound to it."""

    def __init__(self, name: str, context: Any) -> None:
        self.name, self.context = name, context
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}  # name -> address, shape


class TensorRTEngine(Engine):
    """Runs a plan. Raises JetExportError where the plan does not load, and for a call that does not fit it."""

    def __init__(
        self, trt: Any, flavor: Flavor, directory: Path, manifest: Manifest, device: torch.device | None = None
    ) -> None:
        self.trt, self.flavor = trt, flavor
        self.config, self.limits = manifest.config, manifest.limits
        self.device = device or manifest.device
        self.dtype = manifest.dtypes.model
        self.specs = manifest.dtypes.specs(manifest.config)
        self.logger = make_logger(trt)
        self.again = rebuild_hint(manifest)
        self.engine = self._deserialize(directory, bool(manifest.backend.get("library_in_plan")))
        self.dtypes = self._dtypes()
        self._check_bindings(directory)
        self.contexts = [self._context(i) for i in range(len(NAMES))]
        self.rows: dict[int, Tensor] = {}  # logit_indices of decode steps, by batch

    @classmethod
    def open(cls, directory: Path, manifest: Manifest) -> TensorRTEngine:
        """Load a bundle's plan with the installed TensorRT."""
        flavor = FLAVORS[manifest.backend["name"]]
        return cls(flavor.load(), flavor, directory, manifest)

    def _deserialize(self, directory: Path, library_in_plan: bool) -> Any:
        """Load the plan with the plugin library inside it, if any; otherwise, or if that fails, with the bundle's."""
        for library in (None, LIBRARY) if library_in_plan else (LIBRARY,):
            self.runtime = self.trt.Runtime(self.logger)
            self.runtime.engine_host_code_allowed = library_in_plan
            if library and self.runtime.get_plugin_registry().load_library(str(directory / library)) is None:
                raise self._error(f"{directory / library}: TensorRT could not load the plugin library")
            with (directory / PLAN).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = self.runtime.deserialize_cuda_engine(plan)
            if engine is not None:
                return engine
        raise self._error(f"{directory / PLAN}: {self.flavor.title} could not load the engine", self.again)

    def _error(self, what: str, todo: str = "") -> JetExportError:
        said = "; ".join(dict.fromkeys(self.logger.errors))
        self.logger.errors.clear()
        return JetExportError(f"{what}{': ' + said if said else ''}.", todo)

    def _dtypes(self) -> dict[str, torch.dtype | None]:
        """The dtypes of the engine's inputs and outputs, by name; None for one that no state has."""
        known = {getattr(self.trt.DataType, theirs): ours for ours, theirs in DTYPES.items()}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        return {name: known.get(self.engine.get_tensor_dtype(name)) for name in names}

    def _check_bindings(self, directory: Path) -> None:
        """Raises JetExportError unless the engine's states are the model's, in the pools' dtypes."""
        wanted = {n: s.dtype for s in self.specs for n in (s.name, f"{s.name}_out")} | {"logits": self.dtype}
        for name, dtype in wanted.items():
            if name not in self.dtypes:
                raise JetExportError(f"{directory / PLAN}: has no tensor {name}.", self.again)
            if self.dtypes[name] != dtype:
                found = self.dtypes[name]
                raise JetExportError(f"{directory / PLAN}: {name} is {found}, the model's is {dtype}.", self.again)

    def _context(self, profile: int) -> Context:
        """The context of one profile. All share their activation memory, since they run on one stream in turn."""
        if profile == 0:
            count = self.engine.num_optimization_profiles
            if count != len(NAMES):
                raise JetExportError(f"{PLAN}: {count} optimisation profiles, {len(NAMES)} expected.", self.again)
            sizes = [self.engine.get_device_memory_size_for_profile_v2(i) for i in range(len(NAMES))]
            self.memory = torch.empty(max(*sizes, 1), dtype=torch.uint8, device=self.device)
        context = self.flavor.create_context(self.trt, self.engine, decode=NAMES[profile] == "decode")
        if context is None:
            raise self._error(f"{NAMES[profile]}: no execution context")
        with self._stream() as stream:
            if not context.set_optimization_profile_async(profile, stream):
                raise self._error(f"{NAMES[profile]}: its optimisation profile was refused")
        context.set_device_memory(self.memory.data_ptr(), self.memory.numel())
        return Context(NAMES[profile], context)

    @contextmanager
    def _stream(self) -> Iterator[int]:
        """A stream to enqueue on, ordered with the caller's work: a side stream in place of the default one, on which
        TensorRT synchronises."""
        if self.device.type != "cuda":
            yield 0
            return
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            yield current.cuda_stream
            return
        if not hasattr(self, "side"):
            self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.side.wait_stream(current)
        yield self.side.cuda_stream
        current.wait_stream(self.side)

    def _bind(self, c: Context, name: str, tensor: Tensor, shape: bool = True) -> None:
        """Check a tensor and bind its address and, for an input (`shape`), its shape to a context."""
        if not tensor.is_contiguous():
            raise JetExportError(f"{c.name}: {name} is not contiguous (strides {tensor.stride()}).")
        if tensor.dtype != self.dtypes[name]:
            raise JetExportError(f"{c.name}: {name} is {tensor.dtype}, the engine takes {self.dtypes[name]}.")
        now = tensor.data_ptr(), tuple(tensor.shape)
        old = c.bound.get(name)
        if old == now:
            return
        if tensor.device.type != self.device.type:
            raise JetExportError(f"{c.name}: {name} is on {tensor.device}, the engine on {self.device}.")
        if shape and (old is None or old[1] != now[1]) and not c.context.set_input_shape(name, now[1]):
            self.logger.errors.clear()
            low, _, high = self.engine.get_tensor_profile_shape(name, NAMES.index(c.name))
            raise JetExportError(
                f"{c.name}: {name} has shape {list(now[1])}, the engine takes {list(low)} to {list(high)}.",
                "Stay within the bundle's limits, or build with larger ones.",
            )
        if not c.context.set_tensor_address(name, now[0]):
            raise self._error(f"{c.name}: the address of {name} was refused")
        c.bound[name] = now

    def _run(self, profile: int, inputs: dict[str, Tensor]) -> Tensor:
        c = self.contexts[profile]
        for name, tensor in inputs.items():
            if name in self.dtypes:
                self._bind(c, name, tensor)
        for spec in self.specs:
            self._bind(c, f"{spec.name}_out", inputs[spec.name], shape=False)
        rows = inputs["logit_indices"].shape[0]
        logits = torch.empty(rows, self.config.vocab_size, dtype=self.dtype, device=self.device)
        self._bind(c, "logits", logits, shape=False)
        with self._stream() as stream:
            if not c.context.execute_async_v3(stream):
                sizes = f"{inputs['input_ids'].shape[0]} tokens of {inputs['slots'].shape[0]} sequences"
                raise self._error(f"{c.name}: {self.flavor.title} could not run a step of {sizes}")
        return logits

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        return self._run(0, feeds([s.name for s in self.specs], input_ids, batch, logit_indices, states))

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        n = input_ids.shape[0]
        if n not in self.rows:
            self.rows[n] = torch.arange(n, dtype=torch.int32, device=self.device)
        return self._run(1, feeds([s.name for s in self.specs], input_ids, batch, self.rows[n], states))
