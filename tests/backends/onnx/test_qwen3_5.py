"""Qwen3.5's graph, evaluated node by node: what transformers made of the same checkpoint."""

import torch
from helpers.compare import relative_error
from helpers.onnx_models import engines
from helpers.qwen import load_qwen

from jet_export.bundle.limits import Limits
from jet_export.runtime.runner import Runner


def test_prefill_and_decode_are_those_of_transformers(tmp_path) -> None:
    golden = load_qwen("qwen3_5")
    model = golden.model(tmp_path / "model")
    ids, want = golden.input_ids, golden.outputs["logits"]
    (B, T), chunk = ids.shape, 61
    graph, eager = engines(model, tmp_path / "onnx", Limits(max_batch_size=B, max_seq_len=T, prefill_chunk=chunk))
    runner, other = Runner(graph), Runner(eager)
    rows = list(range(B))
    for r in (runner, other):
        logits = [r.prefill(rows, ids[:, :chunk].tolist(), all_logits=True).unflatten(0, (B, chunk))]
        logits += [r.decode(rows, ids[:, t])[:, None] for t in range(chunk, T)]
        assert relative_error(torch.cat(logits, 1), want) < 1e-5
    for a, b, spec in zip(runner.states, other.states, eager.specs, strict=True):
        assert relative_error(a, b) < 1e-5, spec.name
