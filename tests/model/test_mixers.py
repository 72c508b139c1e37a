"""In an engine's graph a JetBlock's op writes the codes that an FP8 o_proj multiplies; no other number changes."""

import pytest
import torch
from helpers.fp8_models import CALIBRATION, model_of, to_fp8

from jet_export.kernels.form import Form
from jet_export.model import linear, mixers
from jet_export.model.fp8 import FP8
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.mode import Linears, Mode, graph_mode


@pytest.fixture(scope="module")
def model() -> JetNemotronForCausalLM:
    model = model_of()
    to_fp8(model, torch.cat(CALIBRATION))
    return model


def steps(
    model: JetNemotronForCausalLM, mode: Mode, linears: Linears, sequences: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of prompts of 20 tokens and then, with these `linears`, of a token each, and the states after."""
    cache = model.new_cache(sequences, 32)
    ids = torch.arange(21 * sequences).view(sequences, 21) % 128
    out = []
    calls: list[tuple[torch.Tensor, Form, Linears]] = [
        (ids[:, :20], Form.MIXED, "library"),
        (ids[:, 20:], Form.DECODE, linears),
    ]
    for tokens, form, kind in calls:
        batch = cache.batch(tokens.shape[1], None)
        with graph_mode(mode, kind), torch.no_grad():
            out.append(model.forward_packed(tokens.reshape(-1), batch, cache.states, None, form).logits)
        cache.advance(batch)
    return out, cache.states


@pytest.mark.parametrize(
    ("linears", "sequences"), [("library", 3), ("fast", 3), ("skinny", 3), ("gemv", 1), ("fused", 1)]
)
def test_codes_change_no_bit_of_an_fp8_model(model, monkeypatch, linears: Linears, sequences: int) -> None:
    monkeypatch.setattr(linear, "SKINNY_OUTPUTS", (33, 4096))
    project, multiplied = linear.project, []

    def watched(layer, x, *args, **kwargs):
        if kwargs.get("residual") is not None:
            multiplied.append(x.dtype)
        return project(layer, x, *args, **kwargs)

    monkeypatch.setattr(mixers, "project", watched)
    logits, states = steps(model, "inductor", linears, sequences)
    assert multiplied == 2 * [FP8, torch.bfloat16, torch.bfloat16, FP8]  # two calls of jet, attn, swa, jet
    monkeypatch.setattr(mixers, "inductor_mode", lambda: False)
    without, states_without = steps(model, "inductor", linears, sequences)
    assert multiplied[8:] == [torch.bfloat16] * 8
    for x, y in zip([*logits, *states], [*without, *states_without], strict=True):
        assert torch.equal(x, y)
    eager, _ = steps(model, "eager", "library", sequences)
    assert torch.equal(eager[0], logits[0]) and (linears not in ("library", "fast") or torch.equal(eager[1], logits[1]))
