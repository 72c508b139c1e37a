"""Calls of an engine captured as CUDA graphs: decode by batch bucket, mixed calls by size.

The graphs share one memory pool: they are replayed one after the other, and what a replay returns is used before the
next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jet_export.runtime.calls import CallSize
from jet_export.runtime.launch_edges import overlap_launches


@dataclass(kw_only=True)
class DecodeGraph:
    """A captured decode step of one batch bucket; it advances `context_lens` itself.

    All that a replay reads and the step did not make is kept here, as the memory of what nobody keeps is used again."""

    graph: torch.cuda.CUDAGraph
    cu_seqlens: Tensor  # [bucket + 1] int32
    integers: Tensor  # [3, >= bucket] int32: slots; context_lens; 1 for a row in use, 0 for padding
    logits: Tensor  # [bucket, vocab]
    slots: list[int] | None = None  # of the rows, if `integers` already hold the next step


@dataclass(kw_only=True)
class MixedGraph:
    """A captured call of prompt chunks and single tokens."""

    graph: torch.cuda.CUDAGraph
    integers: Tensor  # [size.integers] int32


class GraphCache:
    """The captured calls of a runner."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.decode: dict[int, DecodeGraph] = {}  # by bucket
        self.mixed: dict[CallSize, MixedGraph] = {}
        self.mixed_logits: Tensor | None = None  # [most outputs, vocab], shared by the mixed graphs
        self.pool: Any = None
        self.captures = 0  # so far

    def capture(self, call: Callable[[], Tensor], overlap: bool = False) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of `call`, which runs twice, and its result. `overlap`: with launch_edges.py's edges."""
        self.captures += 1
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), torch.inference_mode():
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph(keep_graph=overlap)
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self.pool):
            result = call()
        if overlap:
            overlap_launches(graph.raw_cuda_graph())
            graph.instantiate()
        self.pool = self.pool or graph.pool()
        return graph, result

    def forget_steps(self, but: DecodeGraph | None = None) -> None:
        """The integers of all decode graphs but this one no longer hold the next step."""
        for g in self.decode.values():
            if g is not but:
                g.slots = None
