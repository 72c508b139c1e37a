"""The weight mapper that TensorRT-LLM picks for Hugging Face checkpoints of this architecture."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from torch import Tensor

from jet_export.trtllm.adapt import architecture
from jet_export.trtllm.fuse import fuse_weights


@register_mapper("HF", "JetNemotronForCausalLM")
class JetNemotronWeightMapper(HfWeightMapper):
    """Joins the projections that modeling.py fuses; the base class joins qkv_proj and gate_up_proj."""

    def preprocess_weights(self, weights: dict[str, Any]) -> dict[str, Tensor]:
        return fuse_weights(weights, architecture(self.config.pretrained_config))
