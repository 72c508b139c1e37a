"""A small random model of every layer kind whose projections all fit FP8, and calibration tokens for it."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8 import FP8_PROJECTIONS, Fp8Linear
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.quantization.calibrate import calibration_tokens

TEXT = "def scale(x: float) -> float:\n    return max(abs(x), 1e-6) / 448  # E4M3, \u00e9\u4e16\n" * 20
CONFIG = JetNemotronConfig(
    hidden_size=64,
    intermediate_size=96,
    layer_types=("jet", "attn", "swa", "jet"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    jet_num_heads=2,
    head_k_dim=32,
    expand_v=2.0,
    window_size=24,
    vocab_size=128,
    bos_token_id=0,
    eos_token_id=0,
    max_position_embeddings=1024,
)
CALIBRATION = calibration_tokens(None, TEXT, vocab_size=CONFIG.vocab_size, seq_len=64, windows=3)


def model_of(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> JetNemotronForCausalLM:
    return random_model(replace(CONFIG, **changes), dtype, max_positions=256)


@torch.no_grad()
def to_fp8(model: JetNemotronForCausalLM, ids: torch.Tensor) -> None:
    """Fp8Linear everywhere, with the largest magnitudes seen on `ids` as scales (no modelopt, which takes seconds)."""
    amax: dict[nn.Module, float] = {}
    paths = [p for p, m in model.named_modules() if p.rsplit(".", 1)[-1] in FP8_PROJECTIONS]
    modules = [model.get_submodule(p) for p in paths]
    hooks = [m.register_forward_pre_hook(lambda m, x: amax.update({m: x[0].abs().amax().item()})) for m in modules]
    model(ids)
    for path, linear, hook in zip(paths, modules, hooks, strict=True):
        hook.remove()
        assert isinstance(linear, nn.Linear)
        weight_scale = linear.weight.abs().amax().item() / 448
        model.set_submodule(path, Fp8Linear.from_linear(linear, weight_scale, amax[linear] / 448))
