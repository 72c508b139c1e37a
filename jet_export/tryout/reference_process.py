"""Run as a script: a checkpoint's published code, by transformers, on token ids. argv: a JSON file (published.py).

Imports nothing of jet-export, so that --reference-python may be an environment of other versions."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def attention() -> str:
    """flash-attn where it is installed. The published SDPA form hides a token from itself in sliding windows."""
    return "flash_attention_2" if find_spec("flash_attn") else "eager"


@torch.inference_mode()
def main(asked: dict[str, Any]) -> None:
    """Each greedy token from all before it, without a cache."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked["directory"],
        trust_remote_code=asked["trust"],
        torch_dtype=torch.bfloat16,
        attn_implementation=attention(),
    )
    model = model.to(asked["device"]).eval()
    logits, tokens = [], []
    for prompt in asked["prompts"]:
        ids = torch.tensor([prompt], device=asked["device"])
        for step in range(asked["new_tokens"]):
            last = model(ids).logits[0, -1].float()
            if step == 0:
                logits.append(last.cpu())
            ids = torch.cat([ids, last.argmax()[None, None]], 1)
        tokens.append(ids[0, len(prompt) :].cpu())
    how = f"published code, transformers {transformers.__version__}, bf16, {attention()}"
    save_file({"logits": torch.stack(logits), "tokens": torch.stack(tokens)}, asked["output"], {"how": how})


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
