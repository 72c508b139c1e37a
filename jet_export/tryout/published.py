"""The checkpoint's published code, run by transformers on the ten prompts, in a process of its own.

That code is Python of the checkpoint's repository (Qwen's is transformers' own): it is run only with
--trust-remote-code. Its process takes its memory and its imports with it when it ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from jet_export.model.config import JetNemotronConfig
from jet_export.tryout.outputs import NEW_TOKENS, Outputs

TIMEOUT = 1800  # seconds


def why_not(config: JetNemotronConfig, directory: Path | None, trust_remote_code: bool) -> str | None:
    """Why the published code cannot be tried here; None where it can."""
    if directory is None:
        return "random weights: there is no checkpoint that the published code could load"
    if find_spec("transformers") is None:
        return "transformers is not installed: pip install transformers"
    if config.model_type != "jet_nemotron":
        return None
    if "AutoModelForCausalLM" not in (config.raw.get("auto_map") or {}):
        return f"{directory}/config.json names no published code (auto_map: AutoModelForCausalLM)"
    if not trust_remote_code:
        return "the published code is Python of the checkpoint's repository: --trust-remote-code runs it"
    return None


def run_published(
    directory: Path, prompts: list[list[int]], work: Path, device: str, trust_remote_code: bool
) -> Outputs | str:
    """The published code's outputs, or why it failed: the last line of its process."""
    asked = {"directory": str(directory), "prompts": prompts, "output": str(work / "published.safetensors")}
    (work / "published.json").write_text(json.dumps({**asked, "device": device, "trust": trust_remote_code}))
    command = [sys.executable, "-m", "jet_export.tryout.published", str(work / "published.json")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"transformers did not finish within {TIMEOUT} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return f"transformers could not run it: {lines[-1].strip() if lines else f'exit status {done.returncode}'}"
    return Outputs.load(work / "published.safetensors")


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
        for step in range(NEW_TOKENS):
            last = model(ids).logits[0, -1].float()
            if step == 0:
                logits.append(last.cpu())
            ids = torch.cat([ids, last.argmax()[None, None]], 1)
        tokens.append(ids[0, len(prompt) :].cpu())
    how = f"published code, transformers {transformers.__version__}, bf16, {attention()}"
    Outputs(torch.stack(logits), torch.stack(tokens), how).save(Path(asked["output"]))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
