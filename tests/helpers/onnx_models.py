"""Models exported to ONNX: the file, and its evaluator behind the engine interface."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from jet_export.backends.eager import EagerEngine
from jet_export.backends.onnx.engine import OnnxEngine
from jet_export.backends.onnx.evaluate import OnnxModel
from jet_export.backends.onnx.export import write_onnx
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import WEIGHTS
from jet_export.model.jet_nemotron import JetNemotronForCausalLM

GRAPH_LIMITS = Limits(max_batch_size=8, max_seq_len=512, prefill_chunk=64)


def export(
    model: JetNemotronForCausalLM,
    directory: Path,
    kv_dtype: torch.dtype | None = None,
    interval: int = 1,
    rollback: int = 0,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or k not in _tied(model)}
    save_file({**tensors, "cos_sin": model.cos_sin}, directory / WEIGHTS)
    kv_dtype = kv_dtype or model.dtype
    dtypes = Dtypes(model=model.dtype, kv_cache=kv_dtype, state_interval=interval, rollback=rollback)
    return write_onnx(model, directory, dtypes, GRAPH_LIMITS)


def _tied(model: JetNemotronForCausalLM) -> set[str]:
    return {"lm_head.weight"} if getattr(model.lm_head, "weight", None) is model.embed_tokens.weight else set()


def engines(
    model: JetNemotronForCausalLM, directory: Path, limits: Limits, kv_dtype: torch.dtype | None = None
) -> tuple[OnnxEngine, EagerEngine]:
    """The evaluator of the exported graph, and the model."""
    eager = EagerEngine(model, limits, kv_dtype=kv_dtype or model.dtype, state_dtype=torch.float32)
    graph = OnnxModel.load(export(model, directory, kv_dtype))
    return OnnxEngine.like(eager, graph), eager
