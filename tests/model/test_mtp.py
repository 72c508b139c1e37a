"""Qwen3.5's multi-token-prediction layer: against transformers' parts, and what of a checkpoint is read or refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compare import relative_error
from helpers.mtp import checkpoint, with_predictor
from helpers.qwen import in_blocks, load_qwen

from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch, allocate_states, mtp_spec, state_specs
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.mtp import MultiTokenPredictor
from jet_export.utils.errors import JetExportError, JetExportWarning


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def model(directory: Path) -> JetNemotronForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("error", JetExportWarning)  # nothing is left out
        return with_predictor(directory)


@pytest.mark.parametrize("chunks", [[63], [1, 40, 1, 21]], ids=["whole", "split"])
def test_logits_are_those_of_transformers_parts(model, chunks: list[int]) -> None:
    """Over the hidden states that the model's own calls keep by page."""
    ids, want = load_qwen("qwen3_5").input_ids, load_qwen("qwen3_5_mtp").outputs["logits"]
    B, cpu, rows = len(ids), torch.device("cpu"), torch.arange(len(ids), dtype=torch.int32)
    states = allocate_states(state_specs(model.config, torch.float32, hidden=True), {"slots": B, "pages": B}, cpu)
    table, found, first = rows.flip(0)[:, None], [], 0
    for n in [*chunks, 1]:
        ends, held = torch.arange(B + 1, dtype=torch.int32) * n, torch.full_like(rows, first)
        form = Form.DECODE if n == 1 else Form.PREFILL
        model.forward_packed(
            ids[:, first : first + n].flatten(), PackedBatch(ends, rows, held, table, table), states, None, form
        )
        first += n
    hidden, first = states[-1][table[:, 0].long(), 0, 0], 0
    (kv_cache,) = allocate_states([mtp_spec(model.config, torch.float32)], {"pages": B}, cpu)
    for n in chunks:
        ends, held = torch.arange(B + 1, dtype=torch.int32) * n, torch.full_like(rows, first)
        batch, form = PackedBatch(ends, rows, held, table, table), Form.DECODE if n == 1 else Form.PREFILL
        part, after = hidden[:, first : first + n].flatten(0, 1), ids[:, first + 1 : first + n + 1].flatten()
        logits, _ = model.mtp(after, part, batch, None, kv_cache, form)
        found.append(logits.view(B, n, -1))
        first += n
    assert relative_error(torch.cat(found, 1), want) < 1e-5


def test_without_its_layer_the_checkpoint_is_read_with_a_warning(directory: Path) -> None:
    with pytest.warns(JetExportWarning, match="left out: the multi-token-prediction layer"):
        JetNemotronForCausalLM.from_pretrained(directory, torch.float32)


def test_fp8_blocks_are_widened(model, tmp_path) -> None:
    name = "mtp.layers.0.mlp.down_proj.weight"
    codes, scales, wide = in_blocks(load_qwen("qwen3_5_mtp").weights[name], (48, 40))
    stored = checkpoint(tmp_path, **{name: codes, f"{name}_scale_inv": scales})
    config = load_qwen("qwen3_5").config
    quant = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 40], "activation_scheme": "dynamic"}
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": quant}))
    again = MultiTokenPredictor.from_pretrained(stored, model)
    assert torch.equal(again.layer.mlp.down_proj.weight, wide)
    assert torch.equal(again.fc.weight, model.mtp.fc.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp.fc.weight": None}, r"tensor mtp\.fc\.weight is missing"),
        ({"mtp.layers.1.mlp.up_proj.weight": torch.zeros(2)}, r"mtp\.layers\.1\.mlp\.up_proj\.weight is not known"),
        ({"mtp.fc.weight": torch.zeros(64, 64)}, r"mtp\.fc\.weight has shape \[64, 64\]"),
    ],
)
def test_what_is_not_run_is_refused(model, tmp_path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        MultiTokenPredictor.from_pretrained(checkpoint(tmp_path, **changes), model)
