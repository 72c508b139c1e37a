"""Every kind of cell is a model that computes."""

import json

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.qwen import load_qwen

from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import random_model
from jet_export.search.cells import Cell, base_cell, layer_cell, whole_cell
from jet_export.search.points import Point

CONFIG = mini_config()
QWEN = JetNemotronConfig.from_dict(load_qwen("qwen3_5").config)
POINT = Point(sizes=(), layout="", window_size=0, fp8=False, state_dtype="float32", kv_cache_dtype="auto")


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["jet", "qwen3.5"])
@pytest.mark.parametrize("kind", ["base", "jet", "swa", "attn", "whole"])
def test_a_cell_is_a_model(kind, config) -> None:
    if kind in ("base", "whole"):
        cell = base_cell(config) if kind == "base" else whole_cell(POINT, config)
    elif kind in config.layer_types:
        cell = layer_cell(POINT, config, config.layer_types.index(kind), 2)
    else:
        return
    assert Cell.from_dict(json.loads(json.dumps(cell.describe()))) == cell
    assert cell.kind == kind and cell.layers == len(cell.config.layer_types)
    logits = random_model(cell.config, torch.float32, max_positions=8)(torch.arange(6)[None])
    assert logits.shape == (1, 6, config.vocab_size) and torch.isfinite(logits).all()
