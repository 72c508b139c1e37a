"""config.json for TensorRT-LLM: the published fields, and those that its hybrid-model code reads (adapt.py)."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.checkpoints.base_config_loader import BaseConfigLoader
from tensorrt_llm._torch.models.modeling_utils import register_config_loader
from transformers import AutoConfig, PretrainedConfig

from jet_export.model.config import JetNemotronConfig
from jet_export.trtllm.adapt import excluded_modules, hybrid_fields
from jet_export.trtllm.protocols import ModelConfigLike
from jet_export.utils.errors import JetExportError

# Kept from transformers: it expects other layer types, and treats a null rope_scaling as a request to change it.
OWN = ("layer_types", "efficient_attention_config", "model_type", "rope_scaling")


class JetNemotronHfConfig(PretrainedConfig):
    """AutoConfig's class for a checkpoint's config.json; `jet_nemotron` keeps the published fields."""

    model_type = "jet_nemotron"

    def __init__(self, **kwargs: Any) -> None:
        """Without arguments an empty config, which transformers creates to print differences from it."""
        fields = kwargs.pop("jet_nemotron", None) or kwargs
        self.jet_nemotron: dict[str, Any] = {}
        if "layer_types" in fields:
            self.jet_nemotron = {k: v for k, v in fields.items() if k != "quantization_config"}
            self.jet_nemotron["model_type"] = self.model_type
            self._set_fields(JetNemotronConfig.from_dict(self.jet_nemotron, where="config.json"))
        super().__init__(**{k: v for k, v in kwargs.items() if k not in OWN and k not in self.__dict__})

    def _set_fields(self, c: JetNemotronConfig) -> None:
        self.hidden_size, self.intermediate_size, self.vocab_size = c.hidden_size, c.intermediate_size, c.vocab_size
        self.num_hidden_layers, self.head_dim = c.num_hidden_layers, c.head_dim
        self.num_attention_heads, self.num_key_value_heads = c.num_attention_heads, c.num_key_value_heads
        self.max_position_embeddings, self.rope_theta = c.max_position_embeddings, c.rope_theta
        self.rms_norm_eps = c.rms_norm_eps
        for name, value in hybrid_fields(c).items():
            setattr(self, name, value)


@register_config_loader("jet_nemotron")
class JetNemotronConfigLoader(BaseConfigLoader):
    """For `LLM(checkpoint_loader=HfCheckpointLoader(config_loader=JetNemotronConfigLoader()))`; trtllm-serve's default
    loader reaches the same config through AutoConfig, and the model applies the same corrections."""

    def load(self, checkpoint_dir: str, **kwargs: Any) -> ModelConfig:
        config = ModelConfig.from_pretrained(checkpoint_dir, **kwargs)
        if not isinstance(config.pretrained_config, JetNemotronHfConfig):
            raise JetExportError(f"{checkpoint_dir}: not a Jet-Nemotron checkpoint.", "Leave out this config loader.")
        correct_exclusions(config)
        return config


def correct_exclusions(config: ModelConfigLike) -> None:
    """Rewrite `quant_config.exclude_modules` to this model's fused names, in place."""
    c = JetNemotronConfig.from_dict(config.pretrained_config.jet_nemotron, where="config.json")
    config.quant_config.exclude_modules = excluded_modules(c, config.quant_config.exclude_modules)


AutoConfig.register(JetNemotronHfConfig.model_type, JetNemotronHfConfig)
