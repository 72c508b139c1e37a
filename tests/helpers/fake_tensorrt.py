"""A stand-in for the TensorRT module whose engine is the ONNX evaluator, on memory that it is given by address.

It refuses what the real bindings would: attributes and arguments that the installed tensorrt_rtx does not have (their
signatures stand in its docstrings), and in calls whatever a built engine refuses: shapes outside its profile, unbound
or misaligned addresses, missing activation memory. The tensors, dtypes and profiles are those that TensorRT itself
reported of the engine in the bundle.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jet_export.backends.onnx.evaluate import OnnxModel
from jet_export.backends.tensorrt.builder import PLAN, VERIFY_PLAN
from jet_export.backends.tensorrt.layers import REPORT, VERIFY_REPORT, LayerReport
from jet_export.plugins.library import NAME as LIBRARY

TORCH = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int64": torch.int64,
}
TRT = {"fp32": "FLOAT", "bf16": "BF16", "fp8": "FP8", "int32": "INT32", "int64": "INT64"}
ALIGNMENT = 16  # as the plugins ask
MEMORY = (4096, 1024)  # activation memory that each profile asks for


class Refused(Exception):
    """The real bindings would raise."""


def signatures(method: Any) -> list[list[tuple[str, str, bool]]]:
    """The overloads of a pybind11 method: (name, type, has a default) of each parameter, self left out."""
    lines = [line.strip() for line in (method.__doc__ or "").splitlines()]
    found = [re.match(r"(?:\d+\. )?\w+\((.*)\) -> ", line) for line in lines]
    overloads = [m[1] for m in found if m and "*args" not in m[1]]
    return [[_parameter(p) for p in _split(text)[1:]] for text in overloads]


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[<(") - (c in "]>)")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def _parameter(text: str) -> tuple[str, str, bool]:
    name, _, rest = text.partition(": ")
    kind, _, default = rest.partition(" = ")
    return name, kind, bool(default)


class Bindings:
    """What the real module allows."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def accepts(self, value: Any, kind: str) -> bool:
        if kind in ("str", "bool", "tuple", "list"):
            return type(value).__name__ == kind
        if kind == "typing.SupportsInt":
            return isinstance(value, int) and not isinstance(value, bool)
        if kind == "typing_extensions.Buffer":
            try:
                return bool(memoryview(value).nbytes) or True
            except TypeError:
                return False
        cls = getattr(self.real, kind.rsplit(".", 1)[-1], None)
        return cls is not None and (isinstance(value, cls) or getattr(value, "real_class", None) is cls)

    def check_call(self, cls: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises Refused unless an overload takes the arguments."""
        overloads = signatures(getattr(cls, name))
        if not any(self._fits(parameters, args, kwargs) for parameters in overloads):
            raise Refused(f"{cls.__name__}.{name}: no overload takes {args} {kwargs}: {overloads}")

    def _fits(self, parameters: list[tuple[str, str, bool]], args: tuple, kwargs: dict[str, Any]) -> bool:
        names = [n for n, _, _ in parameters]
        if len(args) > len(names) or set(kwargs) - set(names[len(args) :]):
            return False
        given = dict(zip(names, args, strict=False)) | kwargs
        return all(self.accepts(given[n], kind) if n in given else default for n, kind, default in parameters)


class Checked:
    """An object of the bindings: attributes that the real class lacks are refused, calls are held to its signatures."""

    def __init__(self, bindings: Bindings, real_class: Any, inside: Any) -> None:
        object.__setattr__(self, "parts", (bindings, real_class, inside))
        object.__setattr__(self, "real_class", real_class)

    def __getattr__(self, name: str) -> Any:
        bindings, real, inside = self.parts
        if not hasattr(real, name):
            raise Refused(f"{real.__name__} has no {name}")
        value = getattr(inside, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            bindings.check_call(real, name, args, kwargs)
            return value(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        _, real, inside = self.parts
        if not isinstance(getattr(real, name, None), property) or getattr(real, name).fset is None:
            raise Refused(f"{real.__name__} has no property {name} to be set")
        setattr(inside, name, value)


@dataclass(frozen=True)
class Plan:
    """What a plan's bytes stand for."""

    report: LayerReport
    graph: OnnxModel
    profiles: int


class FakeTensorRT:
    """The module. `bundle`: a directory with real plans, their layer reports and their graphs."""

    def __init__(self, real: Any, bundle: Path) -> None:
        self.real, self.bindings = real, Bindings(real)
        files = [(PLAN, REPORT, "model.onnx", 2), (VERIFY_PLAN, VERIFY_REPORT, "verify.onnx", 1)]
        self.plans = {
            (bundle / plan).read_bytes(): Plan(
                LayerReport.load(bundle / report), OnnxModel.load(bundle / graph), profiles
            )
            for plan, report, graph, profiles in files
            if (bundle / plan).is_file()
        }
        self.library = (bundle / LIBRARY).read_bytes()
        self.contexts: list[Context] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)  # enumerations and base classes, or AttributeError

    def wrap(self, real_class: str, inside: Any) -> Checked:
        return Checked(self.bindings, getattr(self.real, real_class), inside)

    def Runtime(self, *args: Any) -> Checked:
        self.bindings.check_call(self.real.Runtime, "__init__", args, {})
        return self.wrap("Runtime", Runtime(self, *args))


class Runtime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger
        self.engine_host_code_allowed = False
        self.loaded = False

    def get_plugin_registry(self) -> Checked:
        return self.trt.wrap("IPluginRegistry", self)

    def load_library(self, plugin_path: str) -> object | None:
        path = Path(plugin_path)
        self.loaded = path.is_file() and path.read_bytes() == self.trt.library
        if self.loaded:
            return object()
        self.fail(f"{path}: cannot be loaded")
        return None

    def fail(self, text: str) -> None:
        self.logger.log(self.trt.ILogger.ERROR, text)

    def deserialize_cuda_engine(self, plan: Any) -> Checked | None:
        found = self.trt.plans.get(bytes(plan))
        if found is None:
            self.fail("not a plan of this version")
            return None
        if not (self.engine_host_code_allowed or self.loaded):
            self.fail("Cannot find plugin: JetBlock, version: 1")
            return None
        return self.trt.wrap("ICudaEngine", Engine(self, found))


class Engine:
    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self.runtime, self.trt, self.graph = runtime, runtime.trt, plan.graph
        self.bindings = {b["name"]: b for b in plan.report.bindings}
        self.num_io_tensors = len(self.bindings)
        self.num_optimization_profiles = plan.profiles

    def get_tensor_name(self, index: int) -> str:
        return list(self.bindings)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, TRT[self.bindings[name]["dtype"]])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        b = self.bindings[name]
        given = b["profiles"][profile_index] if b["profiles"] else [b["dims"]] * 3
        return [tuple(shape) for shape in given]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return MEMORY[profile_index]

    def create_runtime_config(self) -> Checked:
        return self.trt.wrap("IRuntimeConfig", RuntimeConfig())

    def create_execution_context(self, how: Any) -> Checked:
        self.trt.contexts.append(Context(self, how))
        return self.trt.wrap("IExecutionContext", self.trt.contexts[-1])


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None
    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class Context:
    """Executes by evaluating the graph on the bound memory."""

    def __init__(self, engine: Engine, how: Any) -> None:
        self.engine, self.trt, self.how = engine, engine.trt, how
        self.profile: int | None = None
        self.memory = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def refuse(self, text: str) -> bool:
        """Logs it; False, as the real calls return."""
        self.engine.runtime.fail(text)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return 0 <= profile_index < self.engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = size if memory else 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self.engine.bindings or self.engine.bindings[name]["output"] or self.profile is None:
            return self.refuse(f"{name}: not an input, or no profile is set")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return self.refuse(f"{name}: {shape} is not in profile {self.profile}")
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.bindings or not memory or memory % ALIGNMENT:
            return self.refuse(f"{name}: no such tensor, or a bad address {memory:#x}")
        self.addresses[name] = memory
        return True

    def problem(self) -> str:
        """Why the step cannot run."""
        inputs = [n for n, b in self.engine.bindings.items() if not b["output"]]
        if self.memory < MEMORY[self.profile or 0]:
            return "no activation memory, or too little"
        for name in self.engine.bindings:
            if name not in self.addresses:
                return f"{name} has no address"
        for name in inputs:
            if name not in self.shapes:
                return f"{name} has no shape"
        n = self.shapes["slots"][0]
        wanted = {"cu_seqlens": n + 1, "context_lens": n, "block_table": n, "window_block_table": n}
        wrong = [name for name, size in wanted.items() if self.shapes[name][0] != size]
        return f"{wrong[0]} is not of {n} sequences" if wrong else ""

    def execute_async_v3(self, stream_handle: int) -> bool:
        problem = self.problem()
        if problem:
            return self.refuse(problem)
        feeds = {name: self.at(name, shape).clone() for name, shape in self.shapes.items()}
        for name, value in self.engine.graph.run(feeds).items():
            self.at(name, tuple(value.shape)).copy_(value)
        return True

    def at(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The memory that is bound, as a dense tensor."""
        dtype = TORCH[self.engine.bindings[name]["dtype"]]
        count = torch.Size(shape).numel() * dtype.itemsize
        memory = (ctypes.c_byte * count).from_address(self.addresses[name])
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(shape)
