"""jet-tiny over the eager engine, and a directory that reads as its bundle, for tests of what evaluates a bundle."""

from functools import cache
from pathlib import Path

import torch

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest
from jet_export.model.hf_files import copy_tokenizer
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.llm import LLM
from jet_export.runtime.tokenizer import load_tokenizer

LIMITS = Limits(max_batch_size=4, max_seq_len=256, prefill_chunk=128)


@cache
def model() -> JetNemotronForCausalLM:
    return JetNemotronForCausalLM.from_pretrained(JET_TINY_DIR, torch.float32, "cpu", LIMITS.max_seq_len)


def tiny_engine() -> EagerEngine:
    return EagerEngine(model(), LIMITS)


def tiny_llm(deterministic: bool = False) -> LLM:
    tokenizer = load_tokenizer(JET_TINY_DIR)
    return LLM.over(tiny_engine(), tokenizer, 0, fingerprint="jet-tiny", deterministic=deterministic)


def write_bundle(directory: Path) -> Path:
    """A manifest and a tokenizer; no engine."""
    directory.mkdir()
    copy_tokenizer(JET_TINY_DIR, directory, beside=False)
    Manifest(
        model={"name": "jet-tiny", "source": str(JET_TINY_DIR), "config": model().config.to_dict()},
        backend={"name": "inductor"},
        target={"device": "cpu", "arch": "x86_64"},
        dtype="float32",
        kv_cache_dtype="float32",
        state_dtype="float32",
        limits=LIMITS,
    ).save(directory)
    return directory
