"""Shard: one of the independent streams of rows. It draws a source a document, tokenises it and packs it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jet_export.training.data.rows import Packer, Row
from jet_export.training.data.sources import Source, open_source
from jet_export.training.recipe import DataRecipe
from jet_export.utils.errors import JetExportError

Encode = Callable[[str], list[int]]  # a document's tokens, its end included
EMPTY = 10_000
BYTES_PER_TOKEN = 4  # about; long texts are cut where a row would cut them


class Shard:
    """`weights`: of the sources by name. The draw of document n depends on seed, shard and n alone."""

    def __init__(
        self,
        data: DataRecipe,
        shard: int,
        encode: Encode,
        seed: int,
        weights: Mapping[str, float],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        state = state or {}
        self.shard, self.encode, self.seed = shard, encode, seed
        self.names = [s.name for s in data.source]
        self.weights = [weights[name] for name in self.names]
        piece = BYTES_PER_TOKEN * data.sequence_length
        states = state.get("sources", {})
        self.sources: dict[str, Source] = {
            s.name: open_source(s, shard, data.shards, piece, states.get(s.name))
            for s in data.source
            if weights[s.name] or s.name in states
        }
        self.documents: dict[str, Iterator[str]] = {n: s.documents() for n, s in self.sources.items()}
        self.draws: int = state.get("draws", 0)
        self.packer = Packer(data.sequence_length, state.get("left"))

    def row(self) -> Row:
        """The next row. Raises JetExportError for a source that cannot be read."""
        tried = 0
        while not self.packer.full:
            if (tried := tried + 1) > EMPTY and not self.packer.tokens:
                raise JetExportError(f"data: {EMPTY} documents gave no token to train on.", "Check the sources' field.")
            rng = random.Random(f"{self.seed}/{self.shard}/{self.draws}")
            (name,) = rng.choices(self.names, self.weights)
            self.draws += 1
            self.packer.add(self.encode(next(self.documents[name])))
        return self.packer.take()

    def state(self) -> dict[str, Any]:
        """After the last row; JSON types only."""
        return {
            "sources": {name: source.state for name, source in self.sources.items()},
            "draws": self.draws,
            "left": self.packer.left,
        }
