"""The packages of a multi-token-prediction layer are the layer, and those of the model keep its hidden states."""

import os
from pathlib import Path

import pytest
import torch
from helpers.mtp import checkpoint, with_predictor

from jet_export.backends.eager import EagerEngine
from jet_export.backends.inductor.engine import InductorEngine, Package
from jet_export.backends.inductor.package import compile_package, export_graph
from jet_export.backends.modes import MTP_DECODE, MTP_PREFILL
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.verify.mtp import outputs

LIMITS = Limits(max_batch_size=4, max_seq_len=128, prefill_chunk=32)
DTYPES = Dtypes(model=torch.float32, kv_cache=torch.float32, rollback=4, mtp=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> JetNemotronForCausalLM:
    return with_predictor(checkpoint(tmp_path_factory.mktemp("mtp")))


@pytest.mark.skipif("JET_FAMILIES" not in os.environ, reason="compiles two packages: make families")
def test_the_compiled_layer_is_the_layer(model, tmp_path: Path) -> None:
    weights = {**model.state_dict(), "cos_sin": model.cos_sin}
    graphs = {}
    for mode in (MTP_PREFILL, MTP_DECODE):
        path = tmp_path / f"{mode}.pt2"
        compile_package(export_graph(model, mode, DTYPES, LIMITS), path)
        graphs[mode] = Package(path, torch.device("cpu"))
        graphs[mode].load_weights(weights, path)
    eager = EagerEngine(model, LIMITS, rollback=4)
    engine = InductorEngine.__new__(InductorEngine)
    engine.config, engine.dtype, engine.device, engine.mtp, engine.graphs = (
        eager.config, eager.dtype, eager.device, True, graphs,
    )  # fmt: skip
    calls = [[20, 1, 5, 2], [1] * 4, [3, 1, 1, 1], [1] * 4]
    for got, want in zip(
        outputs(engine, torch.float32, calls, 0), outputs(eager, torch.float32, calls, 0), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["decode_one", "decode_few"])
def test_graphs_of_few_tokens_keep_hidden_states_once(model, mode: str) -> None:
    graph = export_graph(model, mode, DTYPES, LIMITS, fused=True).graph
    (node,) = [n for n in graph.nodes if n.target is torch.ops.jet.keep_hidden.default]
    assert node.args[1].target == f"states_{len(DTYPES.specs(model.config)) - 1}"
