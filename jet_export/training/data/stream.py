"""DataStream: the rows of each step that one process takes, read ahead by threads, with the state after each step."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jet_export.training.data.rows import Row
from jet_export.training.data.shard import Encode, Shard
from jet_export.training.recipe import DataRecipe
from jet_export.utils.errors import JetExportError

AHEAD = 2  # steps
READERS = 8  # threads at most, each with shards of its own
ShardStates = dict[str, Any]  # by the shard's number, as JSON has it


@dataclass(frozen=True)
class StepRows:
    rows: list[Row]
    states: ShardStates  # of this process's shards, after these rows


class DataStream:
    """Row j of a step comes from shard j mod shards; process `rank` of `world` has shards rank, rank + world, ..."""

    def __init__(
        self,
        data: DataRecipe,
        encode: Encode,
        seed: int,
        weights: Mapping[str, float],
        rank: int = 0,
        world: int = 1,
        states: Mapping[str, Any] | None = None,
    ) -> None:
        if data.shards % world:
            raise JetExportError(
                f"data.shards {data.shards} is not a multiple of the {world} processes.",
                "Change data.shards, which with data.batch says how many processes can share a step.",
            )
        states = states or {}
        self.rows_per_shard = data.batch // data.shards
        mine = range(rank, data.shards, world)
        self.shards = {v: Shard(data, v, encode, seed, weights, states.get(str(v))) for v in mine}
        self._readers = ThreadPoolExecutor(min(len(self.shards), READERS, os.cpu_count() or 1), "training shard")
        self._queue: queue.Queue[StepRows | BaseException] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="training data", daemon=True)
        self._thread.start()

    def next(self) -> StepRows:
        """Raises what reading them raised, when their turn has come."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread; the stream gives nothing more."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)
        self._readers.shutdown()

    def _read(self) -> StepRows:
        read = list(self._readers.map(self._rows_of, self.shards.values()))
        rows = [shard_rows[i] for i in range(self.rows_per_shard) for shard_rows in read]
        return StepRows(rows, {str(v): shard.state() for v, shard in self.shards.items()})

    def _rows_of(self, shard: Shard) -> list[Row]:
        return [shard.row() for _ in range(self.rows_per_shard)]

    def _fill(self) -> None:
        while not self._closed.is_set():
            item: StepRows | BaseException
            try:
                item = self._read()
            except BaseException as e:  # raised again by `next`
                item = e
            self._queue.put(item)
            if isinstance(item, BaseException):
                return


def encoder(tokenize: Callable[[str], list[int]], eos: int) -> Encode:
    """`eos` < 0: the model has none."""
    return lambda text: [*tokenize(text), *([eos] if eos >= 0 else [])]
