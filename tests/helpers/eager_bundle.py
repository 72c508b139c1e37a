"""A bundle directory and an LLM over the eager engine: what the runtime's own tests need, with nothing compiled."""

from pathlib import Path

import torch
from helpers.golden import DATA, MINI_NAMES, load_golden

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import random_model
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import ByteTokenizer


def mini_config(**changes) -> JetNemotronConfig:
    return JetNemotronConfig.from_dict({**load_golden(DATA / MINI_NAMES[1]).config, **changes})


def eager_engine(
    limits: Limits,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
) -> EagerEngine:
    model = random_model(mini_config(), dtype, device, seed, max_positions=limits.max_seq_len)
    return EagerEngine(model, limits, kv_dtype or dtype, torch.float32)


def eager_llm(
    limits: Limits, seed: int = 0, eos: int = -1, device: str | torch.device = "cpu", deterministic: bool = False,
    cuda_graphs: bool = True, dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None,
) -> LLM:  # fmt: skip
    engine = eager_engine(limits, seed, device, dtype, kv_dtype)
    return LLM.over(engine, ByteTokenizer(), eos, f"mini {seed}", cuda_graphs, deterministic)


def write_mini_config(directory: Path, **changes) -> Path:
    path = directory / "mini.json"
    mini_config(**changes).save(path)
    return path
