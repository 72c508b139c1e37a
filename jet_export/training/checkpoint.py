"""Checkpoints of a run: directories `step-00001000`, whole once they bear that name.

Each holds what torch.distributed.checkpoint writes (trained parameters and the optimizer's moments, fp32, resharded to
any number of processes when read) and progress.json (steps, tokens, and where each data stream is). Frozen parameters
are the teacher's, and are not in it.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from jet_export.training.distributed import Group, local
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import existing

PROGRESS = "progress.json"
NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Progress:
    """Where a run is: `step` steps are done in all, `stage_step` of them in stage number `stage`."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    shards: dict[str, Any] = field(default_factory=dict)  # the state of each data stream


class Checkpoints:
    """The checkpoints of one run, the last `keep` of them. Every method is called by all processes."""

    def __init__(self, directory: Path, group: Group, keep: int, asynchronous: bool) -> None:
        self.directory, self.group, self.keep, self.asynchronous = directory, group, keep, asynchronous
        self.nbytes = 0  # of the last checkpoint, this process's part
        self._writing: tuple[Path, Future[Any]] | None = None
        if group.first:
            for left in directory.glob(".step-*"):  # of a run that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
        group.barrier()

    def steps(self) -> list[int]:
        """Of the whole ones, in order."""
        return saved_steps(self.directory)

    def save(self, tensors: Mapping[str, Tensor], progress: Progress, wait: bool = False) -> None:
        """Begin to write a checkpoint, or write it if `wait` or not asynchronous. Raises JetExportError, also for the
        one before, if the disk is full or may not be written; what was whole stays."""
        self.finish()
        tmp = self.directory / f".step-{progress.step:08d}"
        self.nbytes = sum(local(t).nbytes for t in tensors.values())
        with self._reported(tmp):
            if self.group.first:
                tmp.mkdir(parents=True, exist_ok=True)
                (tmp / PROGRESS).write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
            self.group.barrier()
            options: dict[str, Any] = {"checkpoint_id": str(tmp), "process_group": self.group.saving}
            if self.asynchronous and not wait:
                own = {k: t.clone() if t.device.type == "cpu" else t for k, t in tensors.items()}
                writing = dcp.async_save(own, **options)
                assert isinstance(writing, Future)
                self._writing = tmp, writing
                return
            dcp.save(dict(tensors), **options)
            self._publish(tmp)

    def finish(self) -> None:
        """Wait for the one that is being written. Raises as `save`."""
        if self._writing is not None:
            (tmp, writing), self._writing = self._writing, None
            with self._reported(tmp):
                writing.result()
                self._publish(tmp)

    def poll(self) -> None:
        """Give the one that was being written its name, if all processes have written their parts. Raises as `save`."""
        if self._writing is not None:
            (done,) = self.group.sum([float(self._writing[1].done())])
            if done == self.group.world:
                self.finish()

    def _publish(self, tmp: Path) -> None:
        self.group.barrier()
        if self.group.first:
            whole = self.directory / tmp.name.removeprefix(".")
            shutil.rmtree(whole, ignore_errors=True)
            tmp.rename(whole)
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self.directory / f"step-{step:08d}", ignore_errors=True)
        self.group.barrier()

    def _reported(self, tmp: Path) -> _Reported:
        return _Reported(self, tmp)

    def last(self) -> Progress | None:
        """Of the newest whole checkpoint."""
        steps = self.steps()
        if not steps:
            return None
        path = self.directory / f"step-{steps[-1]:08d}" / PROGRESS
        try:
            return Progress(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise JetExportError(f"{path}: damaged.", f"Remove {path.parent}; the one before is used then.") from None

    def load(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Fill the tensors with those of this checkpoint, each process with its own parts."""
        load_tensors(self.directory / f"step-{progress.step:08d}", tensors, self.group)


class _Reported:
    """Errors of writing become one message, and the unfinished checkpoint goes."""

    def __init__(self, checkpoints: Checkpoints, tmp: Path) -> None:
        self.checkpoints, self.tmp = checkpoints, tmp

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        if isinstance(error, JetExportError) or not isinstance(error, (Exception, CheckpointException)):
            return
        why = self.reason(error)
        if self.checkpoints.group.first:
            shutil.rmtree(self.tmp, ignore_errors=True)
        steps = self.checkpoints.steps()
        kept = f"The checkpoint of step {steps[-1]} is kept." if steps else "There is no checkpoint yet."
        raise JetExportError(
            f"{self.checkpoints.directory}: {self.tmp.name.removeprefix('.')} cannot be written ({why}). {kept}",
            "Free some space, or lower checkpoint.keep, and go on with --resume.",
        ) from None

    def reason(self, error: BaseException) -> str:
        """torch's writer says of a full disk only that it is not where it should be in the file."""
        found = [e for e in causes(error) if isinstance(e, OSError)]
        full = any(e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) for e in found)
        if full or shutil.disk_usage(existing(self.tmp)).free < self.checkpoints.nbytes:
            return "the disk is full"
        if found:
            return found[0].strerror or str(found[0])
        return str(error).strip().splitlines()[-1] if str(error) else type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those behind it, also of other processes (torch's CheckpointException)."""
    seen: list[BaseException] = [] if error is None else [error]
    for e in seen:
        yield e
        failures = getattr(e, "failures", {})
        inner = [getattr(f, "exc_value", None) or (f[0] if isinstance(f, tuple) else f) for f in failures.values()]
        inner += [e.__cause__, e.__context__]
        seen += [i for i in inner if isinstance(i, BaseException) and i not in seen]


def saved_steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's directory, in order."""
    found = [NAME.fullmatch(p.name) for p in directory.glob("step-*")]
    return sorted(int(m[1]) for m in found if m)


def load_tensors(directory: Path, tensors: dict[str, Tensor], group: Group) -> None:
    """Raises JetExportError where the files are damaged, or of another model."""
    try:
        dcp.load(tensors, checkpoint_id=str(directory), process_group=group.saving)
    except (Exception, CheckpointException) as e:  # torch's is no Exception
        said = str(next((c for c in causes(e) if c is not e), e)).partition("\n")[0]
        raise JetExportError(
            f"{directory}: cannot be read ({said}).", f"Remove {directory}; the one before is used then."
        ) from None
