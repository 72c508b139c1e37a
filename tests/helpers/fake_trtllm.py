"""Puts the stand-ins where `import tensorrt_llm` and `import transformers` find them, for the time of a test."""

import importlib
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from helpers import fake_layers, fake_models, fake_runtime

T = "tensorrt_llm"
LAYOUT: dict[str, list[Any]] = {
    f"{T}.functional": [fake_layers.PositionEmbeddingType],
    f"{T}._torch.model_config": [fake_models.ModelConfig],
    f"{T}._torch.models.modeling_utils": [
        fake_models.DecoderModel,
        fake_models.DecoderModelForCausalLM,
        fake_models.register_auto_model,
        fake_models.register_mapper,
        fake_models.register_config_loader,
    ],
    f"{T}._torch.models.checkpoints.base_config_loader": [fake_models.BaseConfigLoader],
    f"{T}._torch.models.checkpoints.hf.weight_mapper": [fake_models.HfWeightMapper],
    f"{T}._torch.modules.linear": [fake_layers.Linear, fake_layers.TensorParallelMode],
    f"{T}._torch.modules.embedding": [fake_layers.Embedding],
    f"{T}._torch.modules.rms_norm": [fake_layers.RMSNorm],
    f"{T}._torch.modules.gated_mlp": [fake_layers.GatedMLP],
    "transformers": [fake_models.PretrainedConfig, fake_models.AutoConfig],
}
ATTENTION = {
    "old": (f"{T}._torch.modules.attention", f"{T}._torch.attention_backend.interface"),
    "moved": (f"{T}._torch.attention.attention", f"{T}._torch.attention.backends.interface"),
}
INTERFACE: list[Any] = [fake_layers.PositionalEmbeddingParams, fake_layers.RopeParams]
OURS = "jet_export.trtllm."


def _modules(version, attention):
    layout = {**LAYOUT, ATTENTION[attention][0]: [fake_layers.Attention], ATTENTION[attention][1]: INTERFACE}
    modules: dict[str, Any] = {}
    for path, members in layout.items():
        for i in range(1, path.count(".") + 2):
            name = ".".join(path.split(".")[:i])
            modules.setdefault(name, ModuleType(name)).__path__ = []
        for member in members:
            setattr(modules[path], member.__name__, member)
    modules[T].__version__ = version
    for name, module in modules.items():
        if "." in name:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    return modules


@contextmanager
def tensorrt_llm(version="1.2.1", attention="old"):
    """Yields the imported jet_export.trtllm.modeling."""
    saved = dict(sys.modules)
    for registry in (fake_models.MODELS, fake_models.MAPPERS, fake_models.CONFIG_LOADERS, fake_models.AutoConfig.known):
        registry.clear()
    try:
        for name in [n for n in sys.modules if n.split(".")[0] in (T, "transformers") or n.startswith(OURS)]:
            del sys.modules[name]
        sys.modules.update(_modules(version, attention))
        yield importlib.import_module("jet_export.trtllm.modeling")
    finally:
        sys.modules.clear()
        sys.modules.update(saved)


def load_model(directory, ssm_dtype=torch.float32, slots=6, strided=False, version="1.2.1", **model_config):
    """What TensorRT-LLM's loader does with a checkpoint directory, inside `tensorrt_llm()`: (model, executor)."""
    from safetensors.torch import load_file

    config = fake_models.ModelConfig.from_pretrained(directory, skip_create_weights_in_init=True, **model_config)
    config.quant_config.mamba_ssm_cache_dtype = ssm_dtype
    name = config.pretrained_config.architectures[0]
    model = fake_models.MODELS[name](config)
    mapper = fake_models.MAPPERS[f"{name}_HF"]()
    mapper.init_model_and_config(model, config)
    weights = {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}
    model.load_weights(weights, weight_mapper=mapper)
    manager = (fake_runtime.ManagerOf13 if version.startswith("1.3") else fake_runtime.MambaHybridCacheManager)(
        config, slots, strided
    )
    return model, fake_runtime.Executor(model, manager)
