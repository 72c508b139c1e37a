"""A bundle directory and an LLM over the eager engine: what the runtime's own tests need, with nothing compiled."""

from pathlib import Path

import torch
from golden import DATA, MINI_NAMES, load_golden

from jet_export.bundle import Limits
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import random_model
from jet_export.runtime.engine import EagerEngine
from jet_export.runtime.llm import LLM
from jet_export.runtime.runner import Runner
from jet_export.runtime.tokenizer import ByteTokenizer


def mini_config(**changes) -> JetNemotronConfig:
    return JetNemotronConfig.from_dict({**load_golden(DATA / MINI_NAMES[1]).config, **changes})


def eager_engine(limits: Limits, seed: int = 0, device: str | torch.device = "cpu") -> EagerEngine:
    model = random_model(mini_config(), torch.float32, device, seed, max_positions=limits.max_seq_len)
    return EagerEngine(model, limits, torch.float32, torch.float32)


def eager_llm(limits: Limits, seed: int = 0, eos: int = -1, device: str | torch.device = "cpu") -> LLM:
    llm = LLM.__new__(LLM)
    llm.engine = eager_engine(limits, seed, device)
    llm.tokenizer = ByteTokenizer()
    llm.runner = Runner(llm.engine)
    llm.eos = eos
    return llm


def write_mini_config(directory: Path, **changes) -> Path:
    path = directory / "mini.json"
    mini_config(**changes).save(path)
    return path
