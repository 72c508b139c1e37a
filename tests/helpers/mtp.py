"""A small Qwen3.5 with its multi-token-prediction layer, from the goldens."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.golden import Golden
from helpers.qwen import load_qwen
from jet_export.model.config import JetNemotronConfig
from jet_export.model.hf_files import copy_tokenizer
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.mtp import MultiTokenPredictor, predictor_layout, random_predictor
from jet_export.utils.files import DATA


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


def small_directory(directory: Path) -> Path:
    """A checkpoint of random weights with jet-tiny's tokenizer and two layers, whose layer predicts exactly."""
    text = {
        "model_type": "qwen3_5_text", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "tie_word_embeddings": True, "eos_token_id": 0,
        "max_position_embeddings": 2048, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3],
        },
    }  # fmt: skip
    model = random_model(JetNemotronConfig.from_dict(text, where="small"), torch.float32)
    model.mtp = random_predictor(model, 1)
    make_exact(model)
    model.save_pretrained(directory)
    copy_tokenizer(DATA / "jet-tiny", directory, beside=True)
    weights = load_file(directory / "model.safetensors")
    own = dict(model.mtp.named_parameters())
    weights |= {
        name: s.read(own[s.param], torch.float32).contiguous() for name, s in predictor_layout(model.config).items()
    }
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory
