"""The C harness through ctypes: creators, plugin objects and enqueues. Imports no torch."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

TYPES = {"float32": 0, "float16": 1, "int32": 3, "float8_e4m3fn": 6, "bfloat16": 7}  # nvinfer1::DataType
INT32, FLOAT32, FLOAT64 = 5, 1, 2  # nvinfer1::PluginFieldType

Shapes = list[tuple[str, list[int]]]  # dtype, shape


class Tensor(ctypes.Structure):
    _fields_ = (("type", c_int32), ("format", c_int32), ("rank", c_int32), ("dims", c_int64 * 8))

    @classmethod
    def of(cls, dtype: str, shape: list[int], layout: int = 0) -> Tensor:
        return cls(TYPES[dtype], layout, len(shape), (c_int64 * 8)(*shape))

    def dtype_shape(self) -> tuple[str, list[int]]:
        return next(k for k, v in TYPES.items() if v == self.type), list(self.dims[: self.rank])


def tensors_of(descs: Shapes, room: int = 0) -> ctypes.Array[Tensor]:
    return (Tensor * (len(descs) + room))(*(Tensor.of(*d) for d in descs))


class Harness:
    def __init__(self, harness: Path, library: Path):
        self.c = ctypes.CDLL(str(harness))
        self.library = str(library)
        plugin, tensors = c_void_p, POINTER(Tensor)
        signatures: list[Any] = [
            ("messages_taken", c_char_p),
            ("open_creator", c_void_p, c_char_p, c_char_p),
            ("field_names", c_int, c_void_p, c_char_p),
            ("create", c_void_p, c_void_p, c_int, POINTER(c_char_p), POINTER(c_void_p), POINTER(c_int32),
             POINTER(c_int32), c_int),
            ("round_trip", c_void_p, c_void_p, c_void_p, c_char_p),
            ("clone", c_void_p, plugin),
            ("attach", c_void_p, plugin),
            ("destroy", None, plugin),
            ("supports", c_int, plugin, c_int, tensors, c_int, c_int),
            ("num_outputs", c_int, plugin),
            ("configure", c_int, plugin, tensors, c_int, c_int),
            ("workspace", c_size_t, plugin, tensors, c_int, c_int),
            ("outputs_of", c_int, plugin, tensors, c_int),
            ("enqueue", c_int, plugin, tensors, c_int, c_int, POINTER(c_void_p), POINTER(c_void_p), c_void_p, c_void_p),
        ]  # fmt: skip
        for name, result, *arguments in signatures:
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments

    def messages(self) -> str:
        text: bytes = self.c.messages_taken()
        return text.decode()

    def creator(self, node: str) -> int:
        creator: int | None = self.c.open_creator(self.library.encode(), node.encode())
        assert creator, self.messages()
        return creator

    def field_names(self, node: str) -> str:
        text = ctypes.create_string_buffer(1024)
        self.c.field_names(self.creator(node), text)
        return text.value.decode()

    def create(self, node: str, fields: dict[str, Any], runtime: bool = False) -> int | None:
        """The plugin, or None; ints are passed as int32, floats as fp32, a (type, value) pair as that type."""
        values: list[Any] = []
        types: list[int] = []
        for value in fields.values():
            kind, value = value if isinstance(value, tuple) else (INT32 if isinstance(value, int) else FLOAT32, value)
            values.append({INT32: c_int32, FLOAT32: ctypes.c_float, FLOAT64: c_double}[kind](value))
            types.append(kind)
        n = len(values)
        names = (c_char_p * n)(*(name.encode() for name in fields))
        data = (c_void_p * n)(*(ctypes.addressof(v) for v in values))
        plugin: int | None = self.c.create(
            self.creator(node), n, names, data, (c_int32 * n)(*types), (c_int32 * n)(*[1] * n), int(runtime)
        )
        return plugin

    def round_trip(self, node: str, plugin: int, alter: str = "") -> int | None:
        made: int | None = self.c.round_trip(self.creator(node), plugin, alter.encode())
        return made

    def outputs(self, node: str, plugin: int, inputs: Shapes) -> Shapes:
        tensors = tensors_of(inputs, room=self.c.num_outputs(plugin))
        count = self.c.outputs_of(plugin, tensors, len(inputs))
        return [tensors[len(inputs) + i].dtype_shape() for i in range(count)]

    def with_outputs(self, node: str, plugin: int, inputs: Shapes) -> Shapes:
        return [*inputs, *self.outputs(node, plugin, inputs)]

    def described(self, node: str, plugin: int, inputs: Shapes) -> tuple[ctypes.Array[Tensor], int, int]:
        """All tensors, and how many of them are inputs and outputs."""
        all_of_them = self.with_outputs(node, plugin, inputs)
        return tensors_of(all_of_them), len(inputs), len(all_of_them) - len(inputs)

    def supports(self, node: str, plugin: int, pos: int, descs: Shapes, layout: int = 0) -> bool:
        """Whether the plugin accepts tensor `pos` as described; `layout`: its nvinfer1::TensorFormat, 0 is linear."""
        tensors = tensors_of(descs)
        tensors[pos].format = layout
        outputs = self.c.num_outputs(plugin)
        return bool(self.c.supports(plugin, pos, tensors, len(descs) - outputs, outputs))

    def configure(self, node: str, plugin: int, inputs: Shapes) -> int:
        status: int = self.c.configure(plugin, *self.described(node, plugin, inputs))
        return status

    def workspace(self, node: str, plugin: int, inputs: Shapes) -> int:
        size: int = self.c.workspace(plugin, *self.described(node, plugin, inputs))
        return size

    def enqueue(
        self,
        node: str,
        plugin: int,
        inputs: Shapes,
        *,
        addresses: list[int],
        outputs: list[int],
        workspace: int,
        stream: int = 0,
    ) -> int:
        args = (c_void_p * len(addresses))(*addresses), (c_void_p * len(outputs))(*outputs)
        status: int = self.c.enqueue(plugin, *self.described(node, plugin, inputs), *args, workspace, stream)
        return status
