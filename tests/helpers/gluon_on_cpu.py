"""Runs the Hopper form's Gluon code on a CPU: torch tensors in the place of blocks, a thread for each warpgroup.

The kernel's file is executed with stand-ins for Gluon's language. Layouts mean nothing here, shared memory and what a
copy has not brought yet is NaN, a copy arrives when it is waited for, and a barrier that nobody completes raises. So
this shows wrong arithmetic, indices, masks, phases and waits; not what only the GPU's own memory order would.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton.experimental
from torch import Tensor

GLUON = "triton.experimental.gluon"
SECONDS = 60  # that a barrier may take
HALVES = torch.float16, torch.bfloat16


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def of(cls, x: Tensor) -> "Pointer":
        """To a tensor's first element, in all of its storage."""
        rest = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return cls(torch.as_strided(x, (rest,), (1,)))

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + more)


def load(p: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
    at = torch.as_tensor(p.offset)
    if mask is None:
        return p.memory[at]
    at, mask = torch.broadcast_tensors(at, mask)
    return torch.where(mask, p.memory[torch.where(mask, at, 0)], torch.tensor(other, dtype=p.memory.dtype))


def store(p: Pointer, value: Tensor, mask: Any = None) -> None:
    at = torch.as_tensor(p.offset)
    shape = torch.broadcast_shapes(at.shape, value.shape)
    on = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    p.memory[at.expand(shape)[on]] = value.expand(shape)[on]


class Shared:
    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype, self.shape = data, data.dtype, list(data.shape)

    def index(self, i: Any) -> "Shared":
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        return Shared(self.data.view(dtype).view(shape))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype and list(value.shape) == self.shape
        self.data.copy_(value)


def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    return Shared(torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype))


class Barriers:
    """count, arrivals missing and completed phases of each, by its address."""

    def __init__(self) -> None:
        self.state: dict[int, list[int]] = {}
        self.changed = threading.Condition()
        self.failed = False

    def init(self, bar: Shared, count: int) -> None:
        self.state[bar.data.data_ptr()] = [count, count, 0]

    def arrive(self, bar: Shared, count: int) -> None:
        with self.changed:
            of = self.state[bar.data.data_ptr()]
            of[1] -= count
            if of[1] == 0:
                of[1], of[2] = of[0], of[2] + 1
            self.changed.notify_all()

    def wait(self, bar: Shared, parity: Any, pred: Any = True) -> None:
        """Until the phase of this parity is complete: the one that runs has the other."""
        of = self.state[bar.data.data_ptr()]
        with self.changed:
            if pred and not self.changed.wait_for(lambda: self.failed or of[2] % 2 != int(parity), SECONDS):
                raise TimeoutError("a barrier that nobody completes")
            if self.failed:
                raise RuntimeError("another warpgroup failed")


class Copies(threading.local):
    """Of a warpgroup: copies not committed, and groups not waited for."""

    def __init__(self) -> None:
        self.open: list[Any] = []
        self.groups: list[list[Any]] = []

    def async_copy_global_to_shared(self, buffer: Shared, p: Pointer, mask: Tensor) -> None:
        buffer.data.fill_(torch.nan)
        self.open.append((buffer, p, mask))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending:
            for buffer, p, mask in self.groups.pop(0):
                buffer.store(load(p, mask))


def product(a: Any, b: Any, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    left, right = (x.data if isinstance(x, Shared) else x for x in (a, b))
    assert left.dtype == right.dtype and left.dtype in HALVES
    return left.float() @ right.float() + (acc if use_acc else 0)


def wait_products(pending: int, deps: list[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


class Layout:
    def __init__(self, *args: Any, **options: Any) -> None:
        self.value = self


def scalars(*bounds: Any) -> Iterator[Tensor]:
    """range, of scalars that have dtypes, as the kernel's loops have them."""
    return (torch.tensor(i) for i in range(*map(int, bounds)))


def language(barriers: Barriers, program: list[int]) -> SimpleNamespace:
    def warp_specialize(parts: list[Any], warps: list[int], registers: list[int]) -> None:
        errors: list[BaseException] = []

        def part(function: Any, args: tuple[Any, ...]) -> None:
            try:
                function(*args)
            except BaseException as error:
                errors.append(error)
                with barriers.changed:
                    barriers.failed = True
                    barriers.changed.notify_all()

        threads = [threading.Thread(target=part, args=p) for p in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    layouts = ["BlockedLayout", "SliceLayout", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout"]
    layouts += ["NVMMASharedLayout", "SwizzledSharedLayout"]
    dtypes = {str(x).removeprefix("torch."): x for x in (*HALVES, torch.float32, torch.int32, torch.int64)}
    return SimpleNamespace(
        **dict.fromkeys(layouts, Layout), **dtypes,
        constexpr=lambda x: x, static_range=range, static_assert=lambda ok: None, program_id=lambda i: program[i],
        arange=lambda a, b, layout: torch.arange(a, b), expand_dims=torch.unsqueeze, where=torch.where,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype), reshape=torch.reshape,
        permute=torch.permute, sum=torch.sum, convert_layout=lambda x, layout, assert_trivial=False: x, exp=torch.exp,
        rsqrt=torch.rsqrt, cdiv=lambda a, b: (a + b - 1) // b, cast=lambda x, dtype: x.to(dtype), load=load,
        store=store, maximum=lambda x, low: x.clamp(min=low), associative_scan=lambda x, axis, add: x.cumsum(axis),
        allocate_shared_memory=allocate, warp_specialize=warp_specialize,
    )  # fmt: skip


def jit(function: Any = None, **options: Any) -> Any:
    return function or (lambda f: f)


def bounds(cu_seqlens: Pointer, i: int, T: int) -> Any:
    return load(cu_seqlens + i), load(cu_seqlens + (i + 1))


class Launcher:
    """Stands in for the kernel as its launcher launches it: `kernel[grid](...)`, a program after the other."""

    def __init__(self, file: Path) -> None:
        self.source = compile(file.read_text(), str(file), "exec")

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            given = [Pointer.of(x) if torch.is_tensor(x) else x for x in args]
            for i in torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3).tolist():
                self.kernel(i)(*given, **options)

        return launch

    def kernel(self, program: list[int]) -> Any:
        barriers, copies = Barriers(), Copies()
        gluon, hopper = ModuleType(GLUON), ModuleType(f"{GLUON}.language.nvidia.hopper")
        gluon.__dict__.update(jit=jit, language=language(barriers, program))
        hopper.__dict__.update(
            async_copy=copies, mbarrier=SimpleNamespace(
                init=barriers.init, wait=barriers.wait, arrive=barriers.arrive, MBarrierLayout=Layout
            ),
            fence_async_shared=lambda: None, mma_v2=product, warpgroup_mma=product, warpgroup_mma_wait=wait_products,
        )  # fmt: skip
        module: dict[str, Any] = {"__name__": "hopper_on_cpu"}
        stand_ins = {GLUON: gluon, hopper.__name__: hopper}
        with patch.dict(sys.modules, stand_ins), patch.object(triton.experimental, "gluon", gluon, create=True):
            exec(self.source, module)
        module |= {
            "range": scalars, "sequence_bounds": bounds, "softplus": F.softplus, "exp2": torch.exp2,
            "quick_silu": F.silu, "slot_of": lambda slots, i, S: load(slots + i).long(), "opaque_zero": lambda: 0,
        }  # fmt: skip
        return module["hopper_delta_rule_kernel"]


@contextmanager
def hopper_on_cpu() -> Iterator[None]:
    """Inside, hopper_delta_rule runs here."""
    from jet_export.kernels import hopper_gated_delta_rule

    launcher = Launcher(Path(hopper_gated_delta_rule.__file__).with_name("hopper_gated_delta_rule_kernel.py"))
    with patch.object(hopper_gated_delta_rule, "kernel_for", lambda *args: launcher):
        yield
