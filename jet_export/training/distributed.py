"""Processes: torchrun's, or this one alone; and the model sharded over them (FSDP2).

Gradients are averaged over processes, so a process's share of a sum is multiplied by their number (`Group.world`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jet_export.bundle.target import target_device
from jet_export.model.jet_nemotron import KEEP_FP32
from jet_export.training.model import TrainingModel
from jet_export.utils.errors import JetExportError


@dataclass(frozen=True)
class Group:
    """The processes of a run. Collectives of the host's memory go over gloo."""

    rank: int
    world: int
    device: torch.device
    saving: dist.ProcessGroup | None  # a group of its own, for checkpoints that are written while training goes on

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the processes, in fp64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        out: list[float] = total.tolist()
        return out

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        out = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def agree(self, error: JetExportError | None) -> None:
        """Raise the error of any process in all of them, so that none is left waiting for the others."""
        if error is not None and self.world == 1:
            raise error
        if self.world > 1 and self.sum([float(error is not None)])[0]:
            raise JetExportError(next(said for said in self.gather(str(error) if error else None) if said))

    def barrier(self) -> None:
        self.sum([0.0])


@contextmanager
def processes(device: str, gpu: int | None = None) -> Iterator[Group]:
    """The group of torchrun's processes where it started this one, else of this process alone. `device`: auto, cpu or
    cuda. `gpu`: its number; default: torchrun's choice, or the first. Raises JetExportError as `target_device`."""
    kind = target_device(device).type
    local = int(os.environ.get("LOCAL_RANK", "0")) if gpu is None else gpu
    place = torch.device("cpu") if kind == "cpu" else torch.device("cuda", local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    started = not dist.is_initialized()
    if started:
        backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    saving = dist.new_group(backend="gloo") if world > 1 else dist.group.WORLD
    try:
        yield Group(dist.get_rank(), world, place, saving)
    except BaseException:
        if started and world == 1:  # others may wait in a collective call, and this would wait for them
            dist.destroy_process_group()
        raise
    if started:
        dist.destroy_process_group()


def whole_on_each(name: str) -> bool:
    """A_log and dt_bias, which stay fp32 in the forward pass: every process has all of them."""
    return name.endswith(KEEP_FP32)


def shard(model: TrainingModel, group: Group) -> TrainingModel:
    """The model with its parameters over the processes, a layer a unit; itself where there is one process."""
    if group.world == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(group.device.type, (group.world,))
    half = model.dtype != torch.float32
    policy = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False) if half else None
    same: set[nn.Parameter] = {p for name, p in model.named_parameters() if whole_on_each(name)}
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": same, **({"mp_policy": policy} if policy else {})}
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def average_whole_gradients(model: TrainingModel, group: Group) -> None:
    """Of the parameters that FSDP leaves out; it has averaged the others' in backward."""
    if group.world == 1:
        return
    for name, p in model.named_parameters():
        if whole_on_each(name) and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad.div_(group.world)


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another as it is."""
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def is_sharded(x: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on the CPU. A collective call where it is sharded."""
    from torch.distributed.tensor import DTensor

    full: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return full.detach().cpu()
