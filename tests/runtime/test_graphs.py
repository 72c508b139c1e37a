"""Captured calls: a replay reads the memory that the capture read, so what was there before the call must stay there."""

from dataclasses import fields

import pytest
from torch import Tensor

from helpers.simulated_gpu import Times, simulate
from jet_export.model.cache import PackedBatch
from jet_export.runtime.verify_calls import VerifyCalls


@pytest.mark.parametrize("kind", ["decode", "mixed", "verify"])
def test_a_graph_keeps_what_its_replays_read(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made, _ = simulate(monkeypatch, Times(plain=lambda rows: 1.0, verify=lambda tokens: 1.0), rows=4)
    engine, runner = made.engine, made.runner
    verify = VerifyCalls(runner, 5)
    runner.graphs.decode.clear()
    runner.graphs.mixed.clear()
    method = {"decode": "decode", "mixed": "prefill", "verify": "verify"}[kind]
    call, read = getattr(engine, method), []

    def watched(ids: Tensor, batch: PackedBatch, *rest) -> Tensor:
        read.append({name: getattr(batch, name).data_ptr() for name in ("cu_seqlens", "slots", "context_lens")})
        return call(ids, batch, *rest)

    monkeypatch.setattr(engine, method, watched)
    if kind == "verify":
        verify.capture()
        graphs = list(verify.graphs.values())
    else:
        runner.capture_calls(made.scheduler.capacity.token_budget, made.scheduler.prompt_tokens)
        graphs = list(getattr(runner.graphs, kind).values())
    assert len(graphs) == len(read) > 0
    for graph, pointers in zip(graphs, read, strict=True):
        kept = [x for f in fields(graph) if isinstance(x := getattr(graph, f.name), Tensor)]
        for name, pointer in pointers.items():
            assert any(t.data_ptr() <= pointer < t.data_ptr() + t.nbytes for t in kept), name
