"""Captured calls: a replay reads the memory that the capture read, so what was there before it must stay there."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers.simulated_gpu import Times, simulate
from helpers.tape import Tape, place, record, tensors
from torch import Tensor

from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.graphs import GraphCache

KINDS = {"decode": "decode", "mixed": "prefill", "verify": "verify", "feeds": "predict", "steps": "predict"}


def graphs_of(one: BatchingEngine, kind: str) -> list[Any]:
    assert one.executor.verify is not None and one.mtp is not None
    owner = {"verify": one.executor.verify, "feeds": one.mtp.calls, "steps": one.mtp.calls}.get(kind, one.runner.graphs)
    return list(getattr(owner, "graphs" if kind == "verify" else kind).values())


def reading(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, which reads all its arguments, as an engine's does."""

    def reads(*inputs: Any) -> Any:
        for x in tensors(inputs):
            torch.ops.aten.sum(x.float())
        return call(*inputs)

    return reads


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_keeps_what_its_replays_read(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """But for what the engine has as long as it lives."""
    one, _ = simulate(monkeypatch, Times(plain=lambda rows: 1.0, verify=lambda tokens: 1.0), rows=4, speculate="mtp")
    one.runner.graphs.decode.clear()
    one.runner.graphs.mixed.clear()
    monkeypatch.setattr(one.engine, KINDS[kind], reading(getattr(one.engine, KINDS[kind])))
    monkeypatch.setattr(GraphCache, "capture", lambda cache, call, overlap=False: record(call))
    one.prepare()
    assert one.mtp is not None and one.executor.verify is not None
    r, calls, verify = one.runner, one.mtp.calls, one.executor.verify
    shared = [r.block_table, r.window_block_table, r.last_tokens, *r.states, calls.table, calls.kv_cache]
    lasting = [*shared, *(x for x in (r.graphs.mixed_logits, verify.logits) if x is not None)]
    graphs = graphs_of(one, kind)
    assert graphs
    for graph in graphs:
        assert isinstance(graph.graph, Tape)
        kept = [x for f in fields(graph) for x in tensors(getattr(graph, f.name))]
        places = {place(x) for x in (*kept, *lasting)}
        assert [x.shape for x in graph.graph.read if place(x) not in places] == []
        assert any(isinstance(x, Tensor) and place(x) in {place(k) for k in kept} for x in graph.graph.read)
