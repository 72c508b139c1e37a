"""Runs a kernel launcher on symbolic shapes and records its launches as C++ expressions.

Grids, scratch tensors, strides and configurations are written in the launchers of kernels/ and nowhere else. Here these
are called with stand-ins: sizes that are expressions (`Size`), floats that are names (`Scalar`), tensors without
storage (`Shape`). A launcher that branched on a size would fail: a `Size` has no truth value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
}


class Size:
    """A non-negative int64 expression in C++; `divisible`: by 16, which the plugin checks at run time."""

    def __init__(self, code: str, divisible: bool = False) -> None:
        self.code, self.divisible = code, divisible

    def _join(self, other: Any, operator: str, swap: bool = False) -> Size:
        a, b = (other, self) if swap else (self, other)
        if operator == "*" and isinstance(other, int) and other == 1:
            return self
        return Size(f"({code_of(a)} {operator} {code_of(b)})")

    def __add__(self, other: Any) -> Size:
        return self._join(other, "+")

    def __sub__(self, other: Any) -> Size:
        return self._join(other, "-")

    def __mul__(self, other: Any) -> Size:
        return self._join(other, "*")

    def __floordiv__(self, other: Any) -> Size:
        return self._join(other, "/")

    def __radd__(self, other: Any) -> Size:
        return self._join(other, "+", swap=True)

    def __rmul__(self, other: Any) -> Size:
        return self._join(other, "*", swap=True)

    def __rfloordiv__(self, other: Any) -> Size:
        return self._join(other, "/", swap=True)

    def _branch(self, *other: Any) -> Any:
        raise TypeError(f"a launcher branched on the size {self.code}, which is known at run time only")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _branch
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Size:
        names = {torch.sym_min: "std::min<int64_t>", torch.sym_max: "std::max<int64_t>"}
        return Size(f"{names[func]}({code_of(args[0])}, {code_of(args[1])})")


class Scalar(float):
    """A float whose value is a plugin attribute, or a constant times one; an fp32 argument of a kernel."""

    code: str

    def __new__(cls, code: str) -> Scalar:
        self = super().__new__(cls, 1.0)
        self.code = code
        return self

    def __mul__(self, other: float) -> Scalar:
        return Scalar(f"({self.code} * {code_of(other)})")

    __rmul__ = __mul__


def code_of(value: Any) -> str:
    return value.code if isinstance(value, Size | Scalar) else repr(value)


@dataclass(eq=False)
class Shape:
    """The part of a contiguous tensor's interface that launchers use. `name`: the C++ expression of its address."""

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    trace: Trace
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    def stride(self, i: int | None = None) -> Any:
        strides: list[Any] = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, size if isinstance(strides[0], int) and strides[0] == 1 else strides[0] * size)
        return tuple(strides) if i is None else strides[i]

    def __getitem__(self, index: tuple[int, ...]) -> Shape:
        """The part that these first indices name, whose address no launcher asks for."""
        return Shape("", self.shape[len(index) :], self.dtype, self.trace)

    def numel(self) -> Any:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def view(self, *shape: Any) -> Shape:
        return Shape(self.name, shape, self.dtype, self.trace)

    def new_empty(self, *shape: Any, dtype: torch.dtype | None = None) -> Shape:
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return self.trace.allocate(shape, dtype or self.dtype)


@dataclass
class Launch:
    """kernel[grid](args): `arguments` are C++ expressions of the non-constexpr ones, in order."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]
    grid: tuple[str, str, str]
    arguments: list[str]


class Trace:
    """Replaces `wrap` while a launcher runs."""

    def __init__(self) -> None:
        self.buffers: list[tuple[str, str]] = []  # name, bytes
        self.launches: list[Launch] = []
        self.output = ""

    def allocate(self, shape: tuple[Any, ...], dtype: torch.dtype) -> Shape:
        size: Any = dtype.itemsize * math.prod(n for n in shape if not isinstance(n, Size))
        for n in shape:
            size = n * size if isinstance(n, Size) else size
        self.buffers.append((f"b{len(self.buffers)}", code_of(size)))
        return Shape(self.buffers[-1][0], shape, dtype, self)

    def __call__(self, kernel: Any) -> Any:
        trace = self

        class Recorder:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **kwargs: trace.record(kernel, grid, args, kwargs)

        return Recorder()

    def record(self, kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names, params = kernel.arg_names, kernel.params
        given = dict(zip(names, args, strict=False)) | {n: options.pop(n) for n in names if n in options}
        signature, constexprs, divisible, arguments = {}, {}, [], []
        for name, param in zip(names, params, strict=True):
            value = given[name]
            if param.is_constexpr:
                signature[name], constexprs[name] = "constexpr", value
                continue
            if isinstance(value, Shape):
                kind, always, code = POINTERS[value.dtype], True, value.name
            elif isinstance(value, float):
                kind, always, code = "fp32", False, f"Arg::fp32({code_of(value)})"
            else:
                kind, code = "i32", f"Arg::i32({code_of(value)})"
                always = False if param.do_not_specialize else divides(value, kernel, name)
            signature[name] = kind
            arguments.append(code)
            if always:
                divisible.append(name)
        x, y, z = (*(code_of(n) for n in grid), "1", "1")[:3]
        self.launches.append(Launch(kernel, signature, constexprs, tuple(divisible), options, (x, y, z), arguments))


def divides(value: Size | int, kernel: Any, name: str) -> bool:
    """Whether Triton's launcher would specialise this int to a multiple of 16."""
    if isinstance(value, Size):
        if not value.divisible:
            raise TypeError(f"{kernel.__name__}: {name} = {value.code} would be specialised by its value")
        return True
    if value == 1:
        raise TypeError(f"{kernel.__name__}: {name} is 1, which Triton makes a constant")
    return value % 16 == 0


@contextmanager
def tracing(modules: list[Any], **replaced: Any) -> Iterator[Trace]:
    """A Trace in place of `wrap` in these modules; `replaced`: other names of theirs to replace."""
    trace = Trace()
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "wrap", trace))
            for name, value in replaced.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        yield trace
