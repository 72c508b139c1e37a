"""TensorRT plans behind the engine interface: an execution context for each profile, over the caller's tensors.

One plan is for prefill and decode; where the bundle verifies drafts there is another, with its own copy of the weights.

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
from jet_export.backends.tensorrt.builder import PLAN, VERIFY_PLAN
from jet_export.backends.tensorrt.flavors import FLAVORS, Flavor
from jet_export.backends.tensorrt.profiles import NAMES, VERIFY_NAMES
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
    """The execution context of one profile of an engine, and what is bound to it. `dtypes`: of the engine's tensors."""

    def __init__(
        self, name: str, profile: int, engine: Any, dtypes: dict[str, torch.dtype | None], context: Any
    ) -> None:
        self.name, self.profile, self.engine, self.dtypes, self.context = name, profile, engine, dtypes, context
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}  # name -> address, shape


class TensorRTEngine(Engine):
    """Runs plans. Raises JetExportError where the plan does not load, and for a call that does not fit it."""

    def __init__(
        self, trt: Any, flavor: Flavor, directory: Path, manifest: Manifest, device: torch.device | None = None
    ) -> None:
        self.trt, self.flavor = trt, flavor
        self.config, self.limits = manifest.config, manifest.limits
        self.device = device or manifest.device
        self.dtype = manifest.dtypes.model
        self.specs = manifest.dtypes.specs(manifest.config)
        self.state_interval, self.rollback = manifest.state_interval, manifest.rollback
        self.logger = make_logger(trt)
        self.again = rebuild_hint(manifest)
        self.runtimes: list[Any] = []  # each plan's, with the plugins that were in it
        inside = bool(manifest.backend.get("library_in_plan"))
        plans = {PLAN: NAMES, **({VERIFY_PLAN: VERIFY_NAMES} if self.rollback else {})}
        engines = {file: self._deserialize(directory, file, inside) for file in plans}
        sizes = [self._memory_of(file, engines[file], len(names)) for file, names in plans.items()]
        # All contexts share their activation memory, since they run on one stream in turn.
        self.memory = torch.empty(max(*sizes, 1), dtype=torch.uint8, device=self.device)
        self.contexts: list[Context] = []
        for file, names in plans.items():
            dtypes = self._checked_dtypes(directory / file, engines[file])
            self.contexts += [self._context(engines[file], dtypes, i, name) for i, name in enumerate(names)]
        self.rows: dict[int, Tensor] = {}  # logit_indices of all tokens of a step, by their number

    @classmethod
    def open(cls, directory: Path, manifest: Manifest) -> TensorRTEngine:
        """Load a bundle's plan with the installed TensorRT."""
        flavor = FLAVORS[manifest.backend["name"]]
        return cls(flavor.load(), flavor, directory, manifest)

    def _deserialize(self, directory: Path, file: str, library_in_plan: bool) -> Any:
        """Load the plan with the plugin library inside it, if any; otherwise, or if that fails, with the bundle's."""
        for library in (None, LIBRARY) if library_in_plan else (LIBRARY,):
            runtime = self.trt.Runtime(self.logger)
            runtime.engine_host_code_allowed = library_in_plan
            if library and runtime.get_plugin_registry().load_library(str(directory / library)) is None:
                raise self._error(f"{directory / library}: TensorRT could not load the plugin library")
            with (directory / file).open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = runtime.deserialize_cuda_engine(plan)
            if engine is not None:
                self.runtimes.append(runtime)
                return engine
        raise self._error(f"{directory / file}: {self.flavor.title} could not load the engine", self.again)

    def _error(self, what: str, todo: str = "") -> JetExportError:
        said = "; ".join(dict.fromkeys(self.logger.errors))
        self.logger.errors.clear()
        return JetExportError(f"{what}{': ' + said if said else ''}.", todo)

    def _checked_dtypes(self, path: Path, engine: Any) -> dict[str, torch.dtype | None]:
        """The dtypes of an engine's inputs and outputs, by name; None for one that no state has. Raises JetExportError
        unless its states are the model's, in the pools' dtypes."""
        known = {getattr(self.trt.DataType, theirs): ours for ours, theirs in DTYPES.items()}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        dtypes = {name: known.get(engine.get_tensor_dtype(name)) for name in names}
        wanted = {n: s.dtype for s in self.specs for n in (s.name, f"{s.name}_out")} | {"logits": self.dtype}
        for name, dtype in wanted.items():
            if name not in dtypes:
                raise JetExportError(f"{path}: has no tensor {name}.", self.again)
            if dtypes[name] != dtype:
                raise JetExportError(f"{path}: {name} is {dtypes[name]}, the model's is {dtype}.", self.again)
        return dtypes

    def _memory_of(self, file: str, engine: Any, profiles: int) -> int:
        """Bytes of activation memory that the most demanding profile needs."""
        count = engine.num_optimization_profiles
        if count != profiles:
            raise JetExportError(f"{file}: {count} optimisation profiles, {profiles} expected.", self.again)
        return max(int(engine.get_device_memory_size_for_profile_v2(i)) for i in range(profiles))

    def _context(self, engine: Any, dtypes: dict[str, torch.dtype | None], profile: int, name: str) -> Context:
        context = self.flavor.create_context(self.trt, engine, decode=name == "decode")
        if context is None:
            raise self._error(f"{name}: no execution context")
        with self._stream() as stream:
            if not context.set_optimization_profile_async(profile, stream):
                raise self._error(f"{name}: its optimisation profile was refused")
        context.set_device_memory(self.memory.data_ptr(), self.memory.numel())
        return Context(name, profile, engine, dtypes, context)

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
        if tensor.dtype != c.dtypes[name]:
            raise JetExportError(f"{c.name}: {name} is {tensor.dtype}, the engine takes {c.dtypes[name]}.")
        now = tensor.data_ptr(), tuple(tensor.shape)
        old = c.bound.get(name)
        if old == now:
            return
        if tensor.device.type != self.device.type:
            raise JetExportError(f"{c.name}: {name} is on {tensor.device}, the engine on {self.device}.")
        if shape and (old is None or old[1] != now[1]) and not c.context.set_input_shape(name, now[1]):
            self.logger.errors.clear()
            low, _, high = c.engine.get_tensor_profile_shape(name, c.profile)
            raise JetExportError(
                f"{c.name}: {name} has shape {list(now[1])}, the engine takes {list(low)} to {list(high)}.",
                "Stay within the bundle's limits, or build with larger ones.",
            )
        if not c.context.set_tensor_address(name, now[0]):
            raise self._error(f"{c.name}: the address of {name} was refused")
        c.bound[name] = now

    def _run(self, i: int, inputs: dict[str, Tensor]) -> Tensor:
        """A step of the context `i`."""
        c = self.contexts[i]
        for name, tensor in inputs.items():
            if name in c.dtypes:
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
        return self._run(1, self._all_logits(input_ids, batch, states))

    @torch.inference_mode()
    def verify(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        if not self.rollback:
            return super().verify(input_ids, batch, states)
        return self._run(2, self._all_logits(input_ids, batch, states))

    def _all_logits(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> dict[str, Tensor]:
        """The inputs of a step of whose tokens all have logits."""
        n = input_ids.shape[0]
        if n not in self.rows:
            self.rows[n] = torch.arange(n, dtype=torch.int32, device=self.device)
        return feeds([s.name for s in self.specs], input_ids, batch, self.rows[n], states)
