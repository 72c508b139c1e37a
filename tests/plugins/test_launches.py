"""What the plugins launch, seen by a fake driver, is what the torch ops' launchers launch for the same shapes.

The right-hand side runs jet_block_triton and the attention launchers on real tensors with a recorder for `wrap`; the
left-hand side enqueues the plugin in a process whose libcuda.so.1 is fake_cuda.cpp. Compared launch by launch: cubin,
grid, block, shared memory, every argument byte; scratch tensors must lie in the workspace, apart from each other.
"""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import plugin_harness
from helpers.plugin_nodes import fields_of, inputs_of, node_of
from torch import Tensor

from jet_export.kernels import attention, jet_block, step_buffer
from jet_export.kernels.configs import use_sm
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.plugins.cases import ATTENTION_MODULES, JET_BLOCK_MODULES, JetBlockCase, forms_of
from jet_export.plugins.harness.objects import Harness
from jet_export.plugins.symbolic import POINTERS

MODULES = [*JET_BLOCK_MODULES, *ATTENTION_MODULES]
WORKSPACE, OUTPUTS, INPUTS = 1 << 32, 1 << 40, 1 << 44  # addresses that are never read
SHAPES = [(1, 1), (64, 1), (65, 2), (3, 3), (40, 40), (300, 7), (2048, 16)]  # T, N
DRAFTS = [(1, 1), (3, 1), (40, 40), (47, 16)]  # of the form VERIFY


class Recorder:
    """Stands in for wrap: keeps kernel, grid and arguments."""

    def __init__(self):
        self.launches: list[tuple] = []

    def __call__(self, kernel):
        recorder = self

        class Launcher:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: recorder.launches.append((kernel, (*grid, 1, 1)[:3], args, kwargs))

        return Launcher()


def launched(case, inputs: list, form: Form, sms: int, sm: int | None) -> tuple[list[tuple], list, torch.Tensor]:
    """The torch launchers' launches over uninitialised tensors of these shapes, configured for this SM; the inputs; the
    output."""
    tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in inputs]
    recorder, fields = Recorder(), fields_of(case, form)
    interval = fields.pop("interval", 1)
    buffer = (*tensors[11:], interval) if tensors[11:] else NO_BUFFER
    block: Callable[..., Tensor] = jet_block.jet_block_triton
    attend: Callable[..., Tensor] = attention.attention_triton
    patches: list[Any] = [patch.object(module, "wrap", recorder) for module in MODULES]
    patches += [patch.object(m, "num_sms", lambda device: sms) for m in MODULES if hasattr(m, "num_sms")]
    patches.append(patch.object(step_buffer, "INTERPRET", False))  # L2 is asked for states as on a GPU
    with ExitStack() as stack:
        for p in patches:
            stack.enter_context(p)
        stack.enter_context(use_sm(sm))
        if isinstance(case, JetBlockCase):
            o = block(*tensors[:11], *fields.values(), *buffer)
        else:
            o = attend(*tensors, *fields.values())
    return recorder.launches, tensors, o


def kernel_entry(kernels: list[dict], name: str, given: dict, options: dict) -> int:
    """Index of the compiled kernel with these constants, options and pointer types."""
    for i, entry in enumerate(kernels):
        if entry["name"] != name or dict(entry["options"]) != options:
            continue
        kinds = {n: kind for n, kind in entry["signature"] if kind.startswith("*")}
        same = all(POINTERS[given[n].dtype] == kind for n, kind in kinds.items())
        if same and all(given[n] == value for n, value in entry["constexprs"]):
            return i
    raise AssertionError(f"{name} {options} was not compiled")


def bits(value) -> int:
    return struct.unpack("<I", struct.pack("<f", value) if isinstance(value, float) else struct.pack("<i", value))[0]


class Expectation:
    """Compares recorded launches with those of the launchers, one by one."""

    def __init__(
        self, built, node: str, case, T: int, N: int, in_place: bool, device=(9, 0, 132), stored_sm=90, form=Form.MIXED
    ):
        self.built, self.case, self.sm = built, case, stored_sm
        self.kernels = json.loads((built.folder / "kernels.json").read_text())
        self.inputs = inputs_of(case, T, N)
        configured = built.sms[0] if len(built.sms) == 1 else None  # as in compile_kernels
        asked = Form.DECODE if form is Form.MIXED and T == N else form  # no sequence is longer
        self.launches, self.tensors, self.output = launched(case, self.inputs, asked, device[2], configured)
        self.addresses = [INPUTS + (i << 36) for i in range(len(self.inputs))]
        self.states = case.states
        self.outputs = [OUTPUTS, *(self.addresses[i] if in_place else OUTPUTS + ((i + 1) << 36) for i in self.states)]
        self.step = {
            "node": node,
            "fields": fields_of(case, form),
            "inputs": self.inputs,
            "addresses": self.addresses,
            "outputs": self.outputs,
            "workspace": WORKSPACE,
            "device": device,
        }
        self.in_place = in_place

    def check(self, found: dict, workspace: int) -> None:
        assert found["status"] == 0, found["message"]
        seen = found["launches"]
        copies = [launch["args"] for launch in seen if launch["name"] == "memcpy"]
        sizes = [self.tensors[i].nbytes for i in self.states]
        moved = zip(self.outputs[1:], self.states, sizes, strict=True)
        assert copies == ([] if self.in_place else [[to, self.addresses[i], size] for to, i, size in moved])
        seen = seen[len(copies) :]
        assert [launch["name"] for launch in seen] == [kernel.__name__ for kernel, *_ in self.launches]
        self.scratch: dict[int, tuple[int, int]] = {}  # data_ptr -> address, bytes
        for got, (kernel, grid, args, kwargs) in zip(seen, self.launches, strict=True):
            self.check_launch(got, kernel, grid, args, dict(kwargs))
        end = WORKSPACE
        for address, size in sorted(self.scratch.values()):
            assert address >= end and address % 16 == 0
            end = address + size
        assert end <= WORKSPACE + workspace

    def check_launch(self, got: dict, kernel, grid, args, options) -> None:
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {n: options.pop(n) for n in names if n in options}
        i = kernel_entry(self.kernels, got["name"], given, options)
        image = next(image for image in self.kernels[i]["images"] if image["sm"] == self.sm)
        assert got["image"] == plugin_harness.image_hash((self.built.folder / f"{i}_{self.sm}.cubin").read_bytes())
        assert got["grid"] == list(grid)
        assert got["block"] == [32 * options.get("num_warps", 4), 1, 1]
        assert got["shared"] == image["shared"]
        assert got["stream"] == 77
        arguments = [n for n, kind in self.kernels[i]["signature"] if kind != "constexpr"]
        assert got["args"][len(arguments) :] == [0, 0]
        for name, value in zip(arguments, got["args"], strict=False):
            self.check_argument(f"{got['name']}.{name}", given[name], value)

    def check_argument(self, name: str, given, value: int) -> None:
        if not isinstance(given, torch.Tensor):
            assert value == bits(given), name
            return
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        if given.data_ptr() == self.output.data_ptr():
            assert value == self.outputs[0], name
        elif given.data_ptr() in pointers:
            i = pointers.index(given.data_ptr())
            assert value == (self.outputs[1 + self.states.index(i)] if i in self.states else self.addresses[i]), name
        else:
            assert self.scratch.setdefault(given.data_ptr(), (value, given.nbytes)) == (value, given.nbytes), name


def run_steps(built, steps: list[dict], tmp_path: Path, threads: int = 0) -> dict:
    kernels = json.loads((built.folder / "kernels.json").read_text())
    job = {"harness": str(built.harness), "library": str(built.library), "fake": str(built.fake), "kernels": kernels}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job | {"steps": steps, "threads": threads}))
    result = subprocess.run([sys.executable, plugin_harness.__file__, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("model", ["tiny", "mini", "buffered"])
def test_launches_are_those_of_the_ops(model, request, tmp_path):
    built = request.getfixturevalue(model)
    wanted = [
        Expectation(built, node_of(case), case, T, N, in_place=(T + N) % 2 == 0, form=form)
        for case in built.cases
        for form in forms_of(case)
        for T, N in (DRAFTS if form is Form.VERIFY else SHAPES)
        if form is not Form.DECODE or T == N
    ]
    assert {w.in_place for w in wanted} == {True, False}
    found = run_steps(built, [w.step for w in wanted], tmp_path)
    harness = Harness(built.harness, built.library)
    for want, got in zip(wanted, found["results"], strict=True):
        node = want.step["node"]
        plugin = harness.create(node, want.step["fields"])
        assert plugin is not None
        want.check(got, harness.workspace(node, plugin, want.inputs))
    kernels = json.loads((built.folder / "kernels.json").read_text())
    assert found["loads"] == len(kernels)  # once each, for any number of plugins


def test_threads_share_what_is_loaded(mini, tmp_path):
    steps = [Expectation(mini, node_of(c), c, T, 3, True).step for c in mini.cases for T in (3, 70)]
    found = run_steps(mini, steps * 25, tmp_path, threads=8)
    alone = run_steps(mini, steps, tmp_path)
    assert set(found["statuses"]) == {0}
    assert found["loads"] == alone["loads"] == len(json.loads((mini.folder / "kernels.json").read_text()))
    one = sorted(json.dumps(launch) for result in alone["results"] for launch in result["launches"])
    assert sorted(json.dumps(launch) for launch in found["launches"]) == sorted(one * 25)


@pytest.mark.parametrize("device, sm", [((8, 9, 24), 89), ((9, 0, 78), 90)])
def test_the_device_decides_cubins_and_splits(mini, tmp_path, device, sm):
    wanted = [Expectation(mini, node_of(c), c, n, n, True, device, sm) for c in mini.cases for n in (1, 5)]
    found = run_steps(mini, [w.step for w in wanted], tmp_path)
    for want, got in zip(wanted, found["results"], strict=True):
        want.check(got, 1 << 30)


@pytest.mark.parametrize("device, sm", [((8, 6, 84), "8.6"), ((12, 0, 84), "12.0")])
def test_a_gpu_that_was_not_built_for_is_refused(mini, tmp_path, device, sm):
    step = Expectation(mini, "JetBlock", mini.cases[0], 5, 2, True).step | {"device": device}
    (found,) = run_steps(mini, [step], tmp_path)["results"]
    assert found["status"] != 0 and not found["launches"]
    assert f"was not compiled for this GPU (SM {sm}): build the engine again with --sm {sm}" in found["message"]


@pytest.mark.parametrize(
    "call, what",
    [
        ("cuCtxGetDevice", "the calling thread"),
        ("cuDeviceGetAttribute", "the device"),
        ("cuLibraryLoadData", "dynamic_conv_kernel"),
        ("cuLibraryGetKernel", "dynamic_conv_kernel"),
        ("cuMemcpyDtoDAsync", "conv_state"),
        ("cuLaunchKernelEx", "dynamic_conv_kernel, grid 2 x 2 x 1, 128 threads"),
    ],
)
def test_a_failing_driver_call_is_reported(mini, tmp_path, call, what):
    step = Expectation(mini, "JetBlock", mini.cases[0], 5, 2, in_place=False).step
    failing, after = run_steps(mini, [step | {"fail": call}, step], tmp_path)["results"]
    assert failing["status"] != 0
    assert f"jet::JetBlock: {call} failed for {what}" in failing["message"]
    assert "CUDA_ERROR_INVALID_VALUE (1, invalid argument)" in failing["message"]
    assert after["status"] == 0 and after["message"] == "" and after["launches"]  # no kernel was left half loaded


PUSHED_AND_POPPED = [[1077, 0], 0]  # the context of stream 77


def test_a_thread_without_a_context_is_given_the_streams(mini, tmp_path):
    """For the duration of the enqueue; a thread that has a context keeps it, whatever the stream."""
    wanted = [Expectation(mini, node_of(c), c, T, 3, False) for c in mini.cases for T in (3, 70)]
    steps = [w.step | {"context": False} for w in wanted]
    for want, got in zip(wanted, run_steps(mini, steps, tmp_path)["results"], strict=True):
        want.check(got, 1 << 30)
        assert got["contexts"] == PUSHED_AND_POPPED
    for got in run_steps(mini, [w.step for w in wanted], tmp_path)["results"]:
        assert got["contexts"] == [[], 0]
    found = run_steps(mini, steps * 25, tmp_path, threads=8)
    events = found["contexts"][0]
    assert set(found["statuses"]) == {0}
    assert events.count(1077) == events.count(0) == len(steps) * 25


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_default_stream_names_no_context(mini, tmp_path, stream):
    step = Expectation(mini, "JetBlock", mini.cases[0], 5, 2, in_place=False).step | {"stream": stream}
    refused, taken = run_steps(mini, [step | {"context": False}, step], tmp_path)["results"]
    assert refused["status"] != 0 and not refused["launches"] and refused["contexts"] == [[], 0]
    assert "has no current CUDA context" in refused["message"]
    assert "call cudaSetDevice or cuCtxSetCurrent on this thread first" in refused["message"]
    assert taken["status"] == 0 and {launch["stream"] for launch in taken["launches"]} == {stream}


@pytest.mark.parametrize(
    "call, contexts",
    [
        ("cuStreamGetCtx", [[], 0]),
        ("cuCtxPushCurrent", [[], 0]),
        ("cuCtxPopCurrent", PUSHED_AND_POPPED),
        ("cuDeviceGetAttribute", PUSHED_AND_POPPED),
        ("cuLibraryLoadData", PUSHED_AND_POPPED),
        ("cuMemcpyDtoDAsync", PUSHED_AND_POPPED),
        ("cuLaunchKernelEx", PUSHED_AND_POPPED),
    ],
)
def test_what_was_pushed_is_popped_whatever_fails(mini, tmp_path, call, contexts):
    step = Expectation(mini, "JetBlock", mini.cases[0], 5, 2, in_place=False).step | {"context": False}
    failing, after = run_steps(mini, [step | {"fail": call}, step], tmp_path)["results"]
    assert failing["status"] != 0 and failing["contexts"] == contexts
    assert f"jet::JetBlock: {call} failed for" in failing["message"]
    assert after["status"] == 0 and after["contexts"] == PUSHED_AND_POPPED


def test_only_a_missing_context_is_replaced(mini, tmp_path):
    step = Expectation(mini, "JetBlock", mini.cases[0], 5, 2, True).step
    (found,) = run_steps(mini, [step | {"fail": "cuCtxGetDevice"}], tmp_path)["results"]
    assert found["status"] != 0 and found["contexts"] == [[], 0]


def test_unaligned_and_missing_addresses_are_refused(mini, tmp_path):
    step = Expectation(mini, "JetBlock", mini.cases[0], 5, 2, True).step
    steps = [step | {"addresses": [address, *step["addresses"][1:]]} for address in (INPUTS + 8, 0)]
    for found in run_steps(mini, steps, tmp_path)["results"]:
        assert found["status"] != 0 and not found["launches"]
        assert "qkuz is at" in found["message"] and "divisible by 16" in found["message"]
