"""Tensors with any values that Triton lets through, to Triton's model: read, or refused with one message."""

from typing import Any

import numpy as np
import pytest
from helpers.fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from jet_export.server.triton.model import TritonModel
from jet_export.server.triton.request import parse_request
from jet_export.server.triton.tensors import INPUTS
from jet_export.utils.errors import JetExportError

TYPES: dict[str, Any] = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_, "STRING": object}
TEXTS = [
    b"",
    b"a",
    b"\xff",
    b"{}",
    b"[",
    b'{"seed": 1e999}',
    b"\x00",
    b"9" * 5000,
    b"x" * 2000,
    b"json_schema",
    b"regex",
]
VALUES: dict[str, list[Any]] = {
    "INT32": [0, 1, -1, 7, 2**31 - 1, -(2**31)],
    "UINT64": [0, 1, 2**63, 2**64 - 1],
    "FP32": [0.0, -0.0, 1.0, -1.0, 0.7, np.nan, np.inf, -np.inf, 3e38, 1e-45],
    "BOOL": [True, False],
    "STRING": TEXTS,
}
SHAPES = [(0,), (1,), (2,), (1, 1), (1, 3), ()]
KIND = {spec.name: spec.kind for spec in INPUTS}


class Tensor:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self.array


class Backend:
    """Of pb_utils, what reads a request."""

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, Any], name: str) -> Tensor | None:
        return Tensor(request[name]) if name in request else None


@st.composite
def arrays(draw: st.DrawFn, name: str) -> np.ndarray[Any, Any]:
    kind, shape = KIND[name], draw(st.sampled_from(SHAPES))
    array = np.empty(shape, TYPES[kind])
    for i in np.ndindex(shape):
        array[i] = draw(st.sampled_from(VALUES[kind]))
    return array


@pytest.fixture(scope="module")
def model() -> TritonModel:
    model = TritonModel.__new__(TritonModel)  # without an engine
    model.pb, model.max_bytes = Backend, 1000
    return model


def test_tensors(model: TritonModel) -> None:
    @given(st.fixed_dictionaries({}, optional={name: arrays(name) for name in KIND}))
    @example({"text_input": np.array([b"a"], object), "temperature": np.array([np.nan], np.float32)})
    @example({"input_ids": np.zeros((0,), np.int32)})
    @fuzz(60)
    def look(request: dict[str, Any]) -> None:
        try:
            _ = parse_request(model._tensors(request)).params
        except JetExportError as e:
            assert 5 < len(str(e)) < 3000, str(e)[:300]

    look()


@pytest.mark.parametrize("name", KIND)
def test_every_value_beside_a_good_prompt(model: TritonModel, name: str) -> None:
    for value in VALUES[KIND[name]]:
        array = np.empty((1,), TYPES[KIND[name]])
        array[0] = value
        request = {"text_input": np.array([b"a"], object), name: array}
        try:
            _ = parse_request(model._tensors(request)).params
        except JetExportError as e:
            assert 5 < len(str(e)) < 3000, str(e)[:300]
