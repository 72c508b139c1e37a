"""LLMs over the eager engine for the runtime's tests: nothing is compiled."""

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
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
) -> EagerEngine:
    model = random_model(mini_config(), dtype, device, seed, max_positions=limits.max_seq_len)
    return EagerEngine(model, limits, kv_dtype=kv_dtype)


def eager_llm(limits: Limits, *, seed: int = 0, deterministic: bool = False, cuda_graphs: bool = True, **engine) -> LLM:
    """`engine`: options of `eager_engine`."""
    return LLM.over(
        eager_engine(limits, seed=seed, **engine),
        ByteTokenizer(),
        -1,
        fingerprint=f"mini {seed}",
        cuda_graphs=cuda_graphs,
        deterministic=deterministic,
    )


def write_mini_config(directory: Path, **changes) -> Path:
    path = directory / "mini.json"
    mini_config(**changes).save(path)
    return path
