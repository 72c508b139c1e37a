"""Every kind of cell is a model that computes."""

import pytest
import torch
from helpers.eager_bundle import mini_config

from jet_export.model.jet_nemotron import random_model
from jet_export.search.cells import base_cell, layer_cell, whole_cell
from jet_export.search.points import Point

CONFIG = mini_config()
POINT = Point(sizes=(), layout="", window_size=0, fp8=False, state_dtype="float32", kv_cache_dtype="auto")


@pytest.mark.parametrize("kind", ["base", "jet", "swa", "attn", "whole"])
def test_a_cell_is_a_model(kind) -> None:
    if kind in ("base", "whole"):
        cell = base_cell(CONFIG) if kind == "base" else whole_cell(POINT, CONFIG)
    else:
        cell = layer_cell(POINT, CONFIG, CONFIG.layer_types.index(kind), 2)
    assert cell.kind == kind and cell.layers == len(cell.config.layer_types)
    logits = random_model(cell.config, torch.float32, max_positions=8)(torch.arange(6)[None])
    assert logits.shape == (1, 6, CONFIG.vocab_size) and torch.isfinite(logits).all()
