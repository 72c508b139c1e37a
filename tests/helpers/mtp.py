"""A small Qwen3.5 with its multi-token-prediction layer, from the goldens."""

from pathlib import Path
from typing import Any

import torch

from helpers.golden import Golden
from helpers.qwen import load_qwen
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.mtp import MultiTokenPredictor


def checkpoint(directory: Path, **changes: Any) -> Path:
    """The golden model with its layer; `changes`: of its tensors, None: left out."""
    model, layer = load_qwen("qwen3_5"), load_qwen("qwen3_5_mtp")
    weights = {**model.weights, **layer.weights, **changes}
    kept = {k: v for k, v in weights.items() if v is not None}
    return Golden(model.config, [], kept, {}).save_checkpoint(directory)


def with_predictor(directory: Path) -> JetNemotronForCausalLM:
    """The checkpoint's model, whose `mtp` is its layer."""
    model = JetNemotronForCausalLM.from_pretrained(directory, torch.float32, mtp=True)
    model.mtp = MultiTokenPredictor.from_pretrained(directory, model)
    return model


@torch.no_grad()
def make_exact(model: JetNemotronForCausalLM) -> None:
    """A model whose layers add nothing knows the last token only; so does a layer that passes its embedding on."""
    predictor, d = model.mtp, model.config.hidden_size
    assert isinstance(predictor, MultiTokenPredictor)
    for layer in [*model.layers, predictor.layer]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    predictor.fc.weight.copy_(torch.cat([torch.eye(d), torch.zeros(d, d)], 1))
    predictor.pre_fc_norm_embedding.weight.fill_(1)
    predictor.norm.weight.copy_(model.norm.weight)
