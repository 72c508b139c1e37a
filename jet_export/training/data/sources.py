"""Sources: the documents of one shard of a source, endless, epoch after epoch, with a state that says where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from jet_export.training.data.files import Position, read_documents, source_files
from jet_export.training.recipe import SourceRecipe
from jet_export.utils.errors import JetExportError

State = dict[str, Any]  # JSON types only


class Source(Protocol):
    """Documents of a shard. `state` is that after the last document that `documents` gave."""

    state: State

    def documents(self) -> Iterator[str]: ...


class FileSource:
    """Documents index = shard (mod shards) of the source's files; index counts over all of them."""

    def __init__(
        self, source: SourceRecipe, shard: int, shards: int, piece_bytes: int, state: State | None = None
    ) -> None:
        self.source, self.shard, self.shards, self.piece_bytes = source, shard, shards, piece_bytes
        self.files = source_files(source)
        self.state = state or {"epoch": 0, "file": 0, "offset": 0, "index": 0}

    def documents(self) -> Iterator[str]:
        """Raises JetExportError for a file that cannot be read, and where the shard has no document at all."""
        while True:
            found = self.state["index"] > self.shard
            while self.state["file"] < len(self.files):
                file = self.files[self.state["file"]]
                start: Position = (self.state["offset"], self.state["index"])
                for text, (offset, index) in read_documents(self.source, file, start, self._mine, self.piece_bytes):
                    self.state = {**self.state, "offset": offset, "index": index}
                    if text:
                        found = True
                        yield text
                self.state = {**self.state, "file": self.state["file"] + 1, "offset": 0}
            if not found:
                raise JetExportError(
                    f"data source {self.source.name}: {self.state['index']} documents; data.shards is {self.shards}.",
                    "Lower data.shards, or add documents.",
                )
            self.state = {"epoch": self.state["epoch"] + 1, "file": 0, "offset": 0, "index": 0}

    def _mine(self, index: int) -> bool:
        return index % self.shards == self.shard


class HubSource:
    """A streamed dataset of the Hugging Face hub, or a local one that `datasets` loads."""

    def __init__(self, source: SourceRecipe, shard: int, shards: int, state: State | None = None) -> None:
        try:
            from datasets import load_dataset
            from datasets.distributed import split_dataset_by_node
        except ImportError:
            raise JetExportError(f"data source {source.name}: hf needs datasets.", "pip install datasets.") from None
        self.source = source
        try:
            whole = load_dataset(source.hf, source.config or None, split=source.split, streaming=True)
        except Exception as e:  # of the hub, of HTTP, of the dataset's own files
            said = str(e).partition("\n")[0]
            raise JetExportError(
                f"data source {source.name}: hf {source.hf} cannot be loaded ({type(e).__name__}: {said}).",
                "Check its name, config and split, and the network.",
            ) from None
        self.open: Callable[[], Any] = lambda: split_dataset_by_node(whole, shard, shards)
        self.state = state or {"epoch": 0, "dataset": None}

    def documents(self) -> Iterator[str]:
        """Raises JetExportError for a row without the field, or a shard without rows."""
        while True:
            dataset = self.open()
            found = self.state["dataset"] is not None
            if found:
                dataset.load_state_dict(self.state["dataset"])
            for row in dataset:
                text = row.get(self.source.field)
                if not isinstance(text, str):
                    raise JetExportError(
                        f"data source {self.source.name}: a row has no string under {self.source.field!r}; "
                        f"it has: {', '.join(row)}.",
                        "Set the source's field in the recipe.",
                    )
                self.state = {"epoch": self.state["epoch"], "dataset": dataset.state_dict()}
                found = True
                if text:
                    yield text
            if not found:
                raise JetExportError(f"data source {self.source.name}: a shard of it is empty.", "Lower data.shards.")
            self.state = {"epoch": self.state["epoch"] + 1, "dataset": None}


def open_source(source: SourceRecipe, shard: int, shards: int, piece_bytes: int, state: State | None) -> Source:
    if source.hf:
        return HubSource(source, shard, shards, state)
    return FileSource(source, shard, shards, piece_bytes, state)
