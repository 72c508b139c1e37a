"""The checkpoint's published code, run by transformers on the ten prompts, in a process of its own.

That code is Python of the checkpoint's repository (Qwen's is transformers' own): it is run only with
--trust-remote-code. Its process takes its memory and its imports with it when it ends. Jet-Nemotron's wants
transformers <= 4.53, torch <= 2.7.1 and its own flash-linear-attention, which another environment can have:
--reference-python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jet_export.model.config import JetNemotronConfig
from jet_export.tryout.outputs import NEW_TOKENS, Outputs

SCRIPT = Path(__file__).with_name("reference_process.py")
TIMEOUT = 1800  # seconds


@dataclass(frozen=True)
class Published:
    """How the published code is run. `python`: another environment's interpreter; None: this one."""

    trust_remote_code: bool = False
    python: Path | None = None

    def why_not(self, config: JetNemotronConfig, directory: Path | None) -> str | None:
        """Why it cannot be tried here; None where it can."""
        if directory is None:
            return "random weights: there is no checkpoint that the published code could load"
        if self.python is None and find_spec("transformers") is None:
            return "transformers is not installed: pip install transformers, or --reference-python"
        if config.model_type != "jet_nemotron":
            return None
        if "AutoModelForCausalLM" not in (config.raw.get("auto_map") or {}):
            return f"{directory}/config.json names no published code (auto_map: AutoModelForCausalLM)"
        if not self.trust_remote_code:
            return "the published code is Python of the checkpoint's repository: --trust-remote-code runs it"
        return None

    def run(self, directory: Path, prompts: list[list[int]], work: Path, device: str) -> Outputs | str:
        """Its outputs, or why it failed: the last line of its process."""
        output, given = work / "published.safetensors", work / "published.json"
        asked = {"directory": str(directory), "prompts": prompts, "new_tokens": NEW_TOKENS, "output": str(output)}
        given.write_text(json.dumps({**asked, "device": device, "trust": self.trust_remote_code}))
        command = [str(self.python or sys.executable), str(SCRIPT), str(given)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"transformers did not finish within {TIMEOUT} s"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return f"transformers could not run it: {lines[-1].strip() if lines else f'exit status {done.returncode}'}"
        return Outputs.load(output)
