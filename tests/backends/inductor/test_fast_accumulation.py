"""build --fast-accumulation: in the graphs whose FP8 products are the library's, and only where it was asked for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fp8_models import CONFIG, to_fp8

from jet_export.backends.inductor.package import export_graph
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.model.fp8 import Fp8Linear
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.mode import linears

LIMITS = Limits(max_batch_size=4, max_seq_len=64, prefill_chunk=16)


@pytest.fixture(scope="module")
def model() -> JetNemotronForCausalLM:
    model = random_model(replace(CONFIG, layer_types=("jet", "attn")), torch.bfloat16, max_positions=64)
    to_fp8(model, torch.arange(32)[None])
    return model


@pytest.mark.parametrize(
    ("mode", "asked", "traced"),
    [
        ("prefill", False, {"library"}),
        ("prefill", True, {"fast"}),
        ("decode", True, {"fast"}),
        ("verify", True, {"fast"}),
        ("decode_one", True, set()),  # all products are kernels of our own
        ("decode_few", True, {"skinny"}),  # all but those of few outputs, summed as without it
    ],
)
def test_how_a_graph_s_fp8_layers_are_traced(model, monkeypatch, mode: str, asked: bool, traced: set[str]) -> None:
    """Fp8Linear sums fast where the kind is "fast": tests/model/test_fp8.py."""
    seen = set()
    forward = Fp8Linear.forward

    def watched(self: Fp8Linear, *args: Any) -> torch.Tensor:
        seen.add(linears())
        return forward(self, *args)

    monkeypatch.setattr(Fp8Linear, "forward", watched)
    export_graph(
        model,
        mode,
        Dtypes(model=torch.bfloat16, kv_cache=torch.bfloat16, rollback=4, fast_accumulation=asked),
        LIMITS,
    )
    assert seen == traced
