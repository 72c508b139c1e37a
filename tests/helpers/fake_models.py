"""Stand-ins for TensorRT-LLM's model base classes, registries and weight loading; fake_layers.py has the layers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from helpers.fake_layers import Embedding, Linear, LMHead, Mapping, QuantConfig

MODELS: dict[str, type] = {}
MAPPERS: dict[str, type] = {}
CONFIG_LOADERS: dict[str, type] = {}


def register_auto_model(name):
    return lambda cls: MODELS.setdefault(name, cls)


def register_mapper(format, name=None):
    return lambda cls: MAPPERS.setdefault(f"{name}_{format}", cls)


def register_config_loader(name):
    return lambda cls: CONFIG_LOADERS.setdefault(name, cls)


@dataclass(kw_only=True)
class ModelConfig:
    pretrained_config: Any = None
    mapping: Mapping = field(default_factory=Mapping)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    skip_create_weights_in_init: bool = False
    spec_config: Any = None
    lora_config: Any = None

    def get_quant_config(self, name=None):
        return self.quant_config

    @classmethod
    def from_pretrained(cls, checkpoint_dir, trust_remote_code=False, **kwargs):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(checkpoint_dir, trust_remote_code=trust_remote_code)
        quant, path = QuantConfig(), Path(checkpoint_dir) / "hf_quant_config.json"
        if path.exists():
            q = json.loads(path.read_text())["quantization"]
            quant.quant_algo, quant.kv_cache_quant_algo = q["quant_algo"], q["kv_cache_quant_algo"]
            quant.exclude_modules = q.get("exclude_modules")
        return cls(pretrained_config=config, quant_config=quant, **kwargs)


class BaseConfigLoader:
    def load(self, checkpoint_dir, **kwargs):
        raise NotImplementedError

    def cleanup(self):
        pass


class HfWeightMapper:
    def __init__(self):
        self._config = None
        self.mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def init_model_and_config(self, model, config):
        assert isinstance(model.model_config, ModelConfig)
        self._config = config

    @property
    def config(self):
        if self._config is None:
            raise RuntimeError("Weight mapper is not initialized")
        return self._config

    def preprocess_weights(self, weights):
        raise NotImplementedError

    def filter_weights(self, prefix, weights):
        return {k[len(prefix) + 1 :]: v for k, v in weights.items() if k.startswith(prefix)}


class DecoderModel(nn.Module):
    def __init__(self, model_config):
        super().__init__()
        assert isinstance(model_config, ModelConfig)
        self.model_config, self.dtype = model_config, model_config.pretrained_config.torch_dtype


class PostInit(type):
    def __call__(cls, *args, **kwargs):
        model = super().__call__(*args, **kwargs)
        model.__post_init__()
        return model


class DecoderModelForCausalLM(nn.Module, metaclass=PostInit):
    def __init__(self, model, *, config, hidden_size, vocab_size):
        super().__init__()
        self.model_config, self.model = config, model
        hf = config.pretrained_config
        from helpers.fake_layers import TensorParallelMode

        self.lm_head = LMHead(
            vocab_size,
            hidden_size,
            dtype=hf.torch_dtype,
            mapping=config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            gather_output=True,
        )
        if hf.tie_word_embeddings:
            assert self.lm_head.tp_mode == model.embed_tokens.tp_mode, "lm_head and embedding: the same TP mode"
            self.lm_head.weight = model.embed_tokens.weight

    def __post_init__(self):
        """Exclusions by the names of this model's modules, and of the published parts of qkv_proj and gate_up_proj."""
        quant = self.model_config.quant_config
        for name, module in self.named_modules():
            published = {"qkv_proj": "qkv", "gate_up_proj": ("gate", "up")}.get(name.rsplit(".", 1)[-1], ())
            names = [name, *(f"{name.rpartition('.')[0]}.{p}_proj" for p in published)]
            excluded = any(quant.is_module_excluded_from_quantization(n) for n in names)
            if excluded and getattr(module, "quant_config", None) is not None:
                module.quant_config = QuantConfig()
        for module in self.modules():
            create_weights = getattr(module, "create_weights", None)
            if callable(create_weights):
                create_weights()

    @property
    def config(self):
        return self.model_config.pretrained_config

    def forward(
        self,
        attn_metadata,
        input_ids=None,
        position_ids=None,
        inputs_embeds=None,
        return_context_logits=False,
        spec_metadata=None,
        lora_params=None,
        **kwargs,
    ):
        h = self.model(
            input_ids=input_ids,
            attn_metadata=attn_metadata,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            spec_metadata=spec_metadata,
            lora_params=lora_params,
        )
        if not return_context_logits:
            h = h[attn_metadata.seq_lens.cumsum(0) - 1]
        return self.lm_head(h)

    def load_weights(self, weights, weight_mapper=None, skip_modules=()):
        loaded = set()
        for name, module in self.named_modules():
            own = {n for n, p in module._parameters.items() if p is not None}
            if not own or (name == "lm_head" and self.config.tie_word_embeddings):
                continue
            parent, _, last = name.rpartition(".")
            if last in weight_mapper.mapping:
                parts = [f"{parent}.{p}" for p in weight_mapper.mapping[last]]
                module.load_weights([weight_mapper.filter_weights(p, weights) for p in parts])
            elif isinstance(module, Linear | Embedding):
                module.load_weights([weight_mapper.filter_weights(name, weights)])
            else:
                found = weight_mapper.filter_weights(name, weights)
                for n in own:
                    module._parameters[n].data.copy_(found[n][:])
            loaded.add(name)
        assert loaded
        assert not any(p.isnan().any() for p in self.parameters() if p.dtype != torch.float8_e4m3fn)


class PretrainedConfig:
    """transformers' base class: keeps every keyword it is given."""

    model_type = ""

    def __init__(self, **kwargs):
        self.torch_dtype = getattr(torch, kwargs.pop("torch_dtype", "float32"))
        self.architectures = kwargs.pop("architectures", None)
        self.tie_word_embeddings = kwargs.pop("tie_word_embeddings", True)
        for name, value in kwargs.items():
            setattr(self, name, value)


class AutoConfig:
    known: ClassVar[dict[str, type]] = {}

    @classmethod
    def register(cls, model_type, config, exist_ok=False):
        assert model_type == config.model_type
        if model_type in cls.known and not exist_ok:
            raise ValueError(f"'{model_type}' is already used by a Transformers config")
        cls.known[model_type] = config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        values = json.loads((Path(pretrained_model_name_or_path) / "config.json").read_text())
        return cls.known[values["model_type"]](**values)
