"""The models of the run side by side: teacher, what PostNAS made of it, jet-tiny; and the engine of the second."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.weights import CheckpointFiles
from jet_export.postnas.evaluate import Readout, score
from jet_export.postnas.session import Session, Stopped
from jet_export.postnas.tasks import load_task
from jet_export.training.student import load_teacher

CLI = (sys.executable, "-m", "jet_export.cli.app")
ALL = 1_000_000


def compare_models(session: Session, output: Path, items: int = ALL) -> dict[str, Any]:
    """Recall, completions and bits per byte on all of the held-out data (or `items` of each task), in pieces of
    `data.sequence_length` tokens; a piece's first token is not scored, its bytes count. A model at a time."""
    length = session.recipe.data.sequence_length
    ends = session.config.eos_token_id >= 0
    tasks = [load_task(replace(t, items=items), session.encode, ends, length) for t in session.recipe.task]
    text = next(t for t in tasks if not t.counts_answers)
    size = sum(len(t.encode()) for t in _texts(session, text.items))
    found = {}
    models = {"teacher": output / "teacher", "postnas": output / "run/model", "jet-tiny": JET_TINY_DIR}
    for name, directory in models.items():
        session.check_stop()
        files = CheckpointFiles.open(directory)
        half = session.group.device.type == "cuda"
        model = load_teacher(files, torch.bfloat16 if half else torch.float32, session.group.device)
        scores = score(Readout.of(model), tasks)
        scored = sum(stop - start for item in text.items for start, stop in item.spans)
        found[name] = {
            "parameters": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
            "layers": "".join({"jet": "j", "attn": "a", "swa": "s"}[kind] for kind in files.config.layer_types),
            "bits_per_byte": scores[text.name]["loss"] * scored / math.log(2) / size,
            "scores": scores,
        }
    return {"bytes": size, "models": found}


def _texts(session: Session, items: list[Any]) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(JET_TINY_DIR / "tokenizer.json"))
    return tokenizer.decode_batch([item.tokens for item in items], skip_special_tokens=False)


def engine(session: Session, output: Path, seconds: float, limits: dict[str, str]) -> dict[str, Any]:
    """Build, verify and measure the engine by the command line: FP8 on a GPU where nvidia-modelopt is installed, and
    says so. Raises Stopped where `seconds` do not suffice, and RuntimeError where a command fails."""
    gpu = session.group.device.type == "cuda"
    fp8 = gpu and find_spec("modelopt") is not None
    bundle, until = output / "bundle", time.monotonic() + seconds
    if gpu:
        torch.cuda.empty_cache()
    build = ["build", "--model", str(output / "run/model"), "--backend", "inductor", "--output", str(bundle)]
    build += [f"--{k}={v}" for k, v in limits.items()] + (["--fp8"] if fp8 else [])
    context, batch = str(int(limits["max-seq-len"]) // 2), f"1,{limits['max-batch-size']}"
    commands = {
        "build": build,
        "verify": ["verify", str(bundle)],
        "bench": ["bench", str(bundle), "--contexts", context, "--batch", batch, "--output", str(output / "engine")],
    }
    caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # those of training, which travel
    own = {k: v for k, v in os.environ.items() if k not in caches}
    took = {}
    for name, command in commands.items():
        if name == "build" and (bundle / "manifest.json").exists():
            continue
        session.say(f"engine: jet-export {' '.join(command)}")
        began = time.monotonic()
        try:
            done = subprocess.run(
                [*CLI, *command], capture_output=True, text=True, timeout=max(1.0, until - began), check=False, env=own
            )
        except subprocess.TimeoutExpired:
            raise Stopped from None
        took[name] = round(time.monotonic() - began, 1)
        (output / "engine").mkdir(exist_ok=True)
        (output / f"engine/{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        session.say("\n".join(done.stdout.strip().splitlines()[-12:]))
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(f"jet-export {name} ended with status {done.returncode}: {last}")
    return {"precision": "fp8" if fp8 else "bf16" if gpu else "fp32", "seconds": took}
