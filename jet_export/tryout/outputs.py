"""Logits and greedy tokens of the ten prompts: of an engine, of the PyTorch model, and how two of them differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jet_export.runtime.llm import LLM

NEW_TOKENS = 16


@dataclass(frozen=True)
class Outputs:
    """Of P prompts, one after the other."""

    logits: Tensor  # [P, vocab] fp32: of each prompt's last token
    tokens: Tensor  # [P, NEW_TOKENS] int64, greedy
    how: str = ""  # which code, which attention

    def save(self, path: Path) -> None:
        save_file({"logits": self.logits, "tokens": self.tokens}, path, {"how": self.how})

    @classmethod
    def load(cls, path: Path) -> Outputs:
        with safe_open(path, "pt") as f:
            return cls(f.get_tensor("logits"), f.get_tensor("tokens"), (f.metadata() or {}).get("how", ""))


def run_prompts(llm: LLM, prompts: list[list[int]], how: str) -> Outputs:
    """Each prompt alone, as a comparison with code that knows no batches wants it."""
    made = [llm.generate([p], NEW_TOKENS, return_logits=True, ignore_eos=True)[0] for p in prompts]
    logits = [m.logits[0].float() for m in made if m.logits is not None]
    return Outputs(torch.stack(logits), torch.tensor([m.token_ids for m in made]), how)


def compare(ours: Outputs, reference: Outputs) -> dict[str, Any]:
    """Per prompt and in all: KL(reference || ours) in nats and the logits' relative error after the prompt, whether the
    most likely token is the same, and how many greedy tokens are before the first that differs."""
    log_p, log_q = (torch.log_softmax(x.logits.double(), -1) for x in (reference, ours))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    error = (ours.logits - reference.logits).norm(dim=-1) / reference.logits.norm(dim=-1)
    top = ours.logits.argmax(-1) == reference.logits.argmax(-1)
    same = (ours.tokens == reference.tokens).long().cumprod(-1).sum(-1)
    return {
        "reference": reference.how,
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "relative_error_mean": float(error.mean()),
        "same_most_likely_token": int(top.sum()),
        "prompts": [
            {"kl": float(k), "relative_error": float(e), "same_most_likely_token": bool(t), "same_tokens": int(n)}
            for k, e, t, n in zip(kl, error, top, same, strict=True)
        ],
        "new_tokens": ours.tokens.shape[1],
    }
