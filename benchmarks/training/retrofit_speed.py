"""Tokens per second and memory of `jet-export retrofit` on one GPU, a phase at a time, with random weights and tokens.

    python benchmarks/training/retrofit_speed.py [--model jet-2b] [--phase features logits all] [--length 4096]
        [--micro-batch 1 2 4] [--checkpointing] [--compile] [--steps 12] [--hours 50e9] [--minutes 8] [--output FILE]

features, logits: JetBlocks train, the teacher runs forward; all: everything trains on next tokens, without a teacher.
A step is one micro-batch: forward, backward, clipping and AdamW; medians after 4 steps of warm-up. `--hours` gives what
so many tokens take on 8 and 64 GPUs at this speed, with nothing lost between them.

First the gradients of a small model on this device are compared with those of the CPU in fp32, phase by phase; no speed
without it. --output is written after each row, and no row begins after --minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jet_export.bundle.target import target_device
from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import load_config
from jet_export.model.jet_nemotron import random_model
from jet_export.training.data.rows import IGNORED, Row
from jet_export.training.distributed import Group
from jet_export.training.flops import flops_per_token, peak_flops
from jet_export.training.model import TrainingModel
from jet_export.training.objective import FeatureObjective, LogitsObjective, Objective, backward
from jet_export.training.optimizer import clip_gradients, make_optimizer
from jet_export.training.recipe import PARTS, OptimizerRecipe, Recipe, StageRecipe
from jet_export.training.student import new_student, set_trainable
from jet_export.utils.environment import write_result

WARM_UP = 4
CHECKED = 512  # tokens of a row whose gradients are compared
PHASES = {
    "features": StageRecipe(loss="features"),
    "logits": StageRecipe(ce_weight=0.1),
    "all": StageRecipe(train=PARTS, kl_weight=0.0, ce_weight=1.0),
}
FP32, BF16 = 1e-3, 0.02  # bounds of a gradient's error
SMALL = JetNemotronConfig(
    hidden_size=256,
    intermediate_size=256,
    layer_types=("jet", "attn", "swa", "jet"),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=128,
    jet_num_heads=2,
    head_k_dim=96,
    expand_v=2.6666666667,
    window_size=100,
    vocab_size=1024,
    bos_token_id=0,
    eos_token_id=0,
)


def random_rows(rows: int, length: int, vocab: int, seed: int) -> list[Row]:
    """Documents of 1 to 2048 tokens, log-uniform."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(rows):
        lengths: list[int] = []
        while (left := length - sum(lengths)) > 0:
            lengths.append(min(left, int(2 ** (11 * torch.rand((), generator=rng).item()))))
        tokens = torch.randint(vocab, (length,), generator=rng).tolist()
        labels, at = [], 0
        for n in lengths:
            labels += [*tokens[at + 1 : at + n], IGNORED]
            at += n
        out.append(Row(tokens, labels, lengths))
    return out


def build(
    config: JetNemotronConfig, phase: str, dtype: torch.dtype, device: torch.device
) -> tuple[Objective, TrainingModel | None]:
    """The phase's objective with a random teacher, which is None where it is not needed."""
    stage = PHASES[phase]
    attention = replace(config, layer_types=("attn",) * config.num_hidden_layers, jet_layers=(), model_type="qwen2")
    model = random_model(attention, dtype, device, max_positions=1)
    teacher = TrainingModel(model, dtype).requires_grad_(False)
    student = new_student(teacher, config, Recipe(stage=(stage,)))
    set_trainable(student, stage.train)
    if phase == "all":
        return LogitsObjective(student, None, stage), None
    kind = FeatureObjective(student, teacher) if phase == "features" else LogitsObjective(student, teacher, stage)
    return kind, teacher


def gradients(phase: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Of the small model, whose weights are drawn on the CPU for every device."""
    objective, _ = build(SMALL, phase, torch.float32, torch.device("cpu"))
    for model in (objective.student, getattr(objective, "teacher", None)):
        if model is not None:
            model.to(device)
            model.dtype = dtype
    backward(objective, random_rows(2, CHECKED, SMALL.vocab_size, 0), 2, alone(device))
    return {n: p.grad.cpu() for n, p in objective.student.named_parameters() if p.grad is not None}


def check(phase: str, device: torch.device) -> dict[str, float]:
    """The largest error of a gradient against the CPU's in fp32, by dtype: in fp32 at most FP32, in bf16 at most twice
    that of the CPU's bf16 plus BF16. Raises SystemExit."""
    cpu = torch.device("cpu")
    exact = gradients(phase, torch.float32, cpu)
    rounded = errors(gradients(phase, torch.bfloat16, cpu), exact)
    bounds = {torch.float32: dict.fromkeys(exact, FP32), torch.bfloat16: {n: 2 * e + BF16 for n, e in rounded.items()}}
    found = {}
    for dtype, bound in bounds.items():
        ours = errors(gradients(phase, dtype, device), exact)
        for name, error in ours.items():
            if not error <= bound[name]:
                raise SystemExit(f"{phase}, {dtype}: the gradient of {name} is off by {error:.2g}.")
        found[str(dtype).removeprefix("torch.")] = max(ours.values())
    return found


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """||g - g'|| / ||g'|| of each parameter's gradient."""
    return {n: float((ours[n] - g).norm() / g.norm().clamp(min=1e-20)) for n, g in exact.items()}


def alone(device: torch.device) -> Group:
    return Group(0, 1, device, None)


def measure(
    models: tuple[Objective, TrainingModel | None], phase: str, micro_batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One phase at one micro-batch; `error` where the memory does not suffice."""
    objective, teacher = models
    device, vocabulary = objective.student.embed_tokens.weight.device, objective.student.config.vocab_size
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    try:
        optimizer = make_optimizer(objective.student, PHASES[phase], OptimizerRecipe())
        for step in range(WARM_UP + args.steps):
            rows = random_rows(micro_batch, args.length, vocabulary, step)
            start = time.perf_counter()
            backward(objective, rows, micro_batch, alone(device))
            clip_gradients(optimizer, 1.0, alone(device))
            optimizer.step()
            optimizer.zero_grad()
            if gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        objective.student.zero_grad()
        return {"phase": phase, "micro_batch": micro_batch, "error": "out of memory"}
    median = statistics.median(times[WARM_UP:])
    speed = micro_batch * args.length / median
    flops, peak = flops_per_token(objective.student, teacher, PHASES[phase]), peak_flops(device)
    return {
        "phase": phase,
        "micro_batch": micro_batch,
        "tokens_per_s": round(speed, 1),
        "seconds": [round(t, 5) for t in times[WARM_UP:]],
        "warm_up_seconds": [round(t, 2) for t in times[:WARM_UP]],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
        "flops_per_token": flops,
        "mfu": round(speed * flops / peak, 4) if peak else None,
        "hours": {n: round(args.hours / speed / 3600 / n, 1) for n in (1, 8, 64)},
    }


def built(
    config: JetNemotronConfig, phase: str, args: argparse.Namespace, device: torch.device
) -> tuple[Objective, TrainingModel | None]:
    """The phase's objective in the dtype of a run on this device, with layers as the options say."""
    objective, teacher = build(config, phase, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    for layer in (*objective.student.training_layers, *(teacher.training_layers if teacher else ())):
        layer.activation_checkpointing = args.checkpointing
        if args.compile:
            layer.compile()
    return objective, teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="jet-2b", help="a preset or config.json: the student")
    parser.add_argument("--phase", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--hours", type=float, default=50e9, help="tokens of a run")
    parser.add_argument("--minutes", type=float, default=60, help="no row begins after so many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    device = target_device(args.device)
    config = load_config(args.model)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "device", "phase", "micro_batch", "minutes")}
    checked: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for phase in args.phase:
        checked[phase] = check(phase, device)
        print(f"{phase}: gradients' errors {checked[phase]}", flush=True)
        models = None
        for micro_batch in args.micro_batch:
            if time.monotonic() > until:
                print(f"{phase}, micro-batch {micro_batch}: not begun, --minutes is over", flush=True)
                continue
            models = models or built(config, phase, args, device)
            row = measure(models, phase, micro_batch, args)
            rows.append(row)
            print(" ".join(f"{k} {v}" for k, v in row.items() if k not in ("seconds", "flops_per_token")), flush=True)
            if args.output:
                write_result(args.output, {**settings, "gradient errors": checked, "rows": rows})
            if "error" in row:
                break


if __name__ == "__main__":
    main()
