"""Trains jet-tiny: 5.4 M parameters, Python's standard library and a recall task, minutes on one GPU.

    python examples/train_jet_tiny.py --output out                          # an H100 or H200
    python examples/train_jet_tiny.py --output out --corpus corpus.tar.xz
    python examples/train_jet_tiny.py --output out --device cpu --smoke     # every step of it, tiny

Writes model.safetensors, midway.safetensors (at 60 % of the schedule: what jet_export/data/jet-tiny holds, as the rest
of the run overfits), eval.json of the former and training.json (benchmarks/results/h200/jet-tiny-training.json) to
--output; --evaluate makes eval.json of other weights. The learning rate follows the wall clock, so that the run
always ends in time. Files of the corpus list that this Python's library lacks or has otherwise are named and left
out; --corpus takes a directory or a tar of the right ones (examples/prepare_jet_tiny.py --snapshot packs it).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
import sysconfig
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from jet_tiny import evaluate
from jet_tiny.data import Batches, Data, held_out_probe, load_data
from jet_tiny.model import JetTiny
from jet_tiny.optimizer import build_optimizers, lr_scale, set_lr_scale
from jet_tiny.recall import RecallTask
from safetensors.torch import load_file, save_file
from torch import Tensor

from jet_export.model.config import JetNemotronConfig

DATA = Path(__file__).resolve().parent.parent / "jet_export" / "data"
SLICE_BYTES = 8192  # the beginning of heldout.txt that the tests measure again on a CPU
RECALL_EVAL_ROWS = 256
RECORDED_OPTIONS = ("batch", "length", "dropout", "seed", "max_seconds", "max_steps", "recall_pool", "compile")


def weighted_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden, embedding.to(hidden.dtype)).flatten(0, 1).float()
    loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def probe_bits_per_byte(model: JetTiny, tokens: Tensor, size: int) -> float:
    losses = [F.cross_entropy(model(t[:, :-1]).float().mT, t[:, 1:], reduction="sum") for t in tokens.split(8)]
    return sum(loss.item() for loss in losses) / math.log(2) / size


def train(config: JetNemotronConfig, data: Data, args: argparse.Namespace, started: float) -> tuple[JetTiny, dict]:
    """The trained model (fp32 master weights) and the run's record. Exits with status 3 when the loss diverges."""
    model = JetTiny(config, torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(args.seed))
    model.to(args.device).train()
    shadow = JetTiny(config, torch.bfloat16).to(args.device).eval()  # for the curve: never compiled, no dropout
    loss_of = torch.compile(weighted_loss) if args.compile else weighted_loss
    for layer in model.model.layers:
        layer.dropout = args.dropout
        if args.compile:
            layer.compile()
    optimizers = build_optimizers(model)
    batches = Batches(data, args.batch, args.length, args.device, args.recall_pool)
    probe, probe_size = held_out_probe(data, args.batch, args.length)
    probe = probe.to(args.device)
    curve: list[dict[str, float]] = []
    step, first, saved_midway = 0, None, False
    steady, steady_step = time.perf_counter(), 0  # tokens per second are counted from here
    while True:
        now = time.perf_counter() - started
        first = now if first is None else first
        progress = max((now - first) / (args.max_seconds - first), step / args.max_steps)
        set_lr_scale(optimizers, lr_scale(progress))
        inputs, targets, weights = batches.next()
        loss = loss_of(model.hidden(inputs), model.model.embed_tokens.weight, targets, weights)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step == 5:
            loss.item()
            first = time.perf_counter() - started  # compilation is over
            steady, steady_step = time.perf_counter(), step
        if step % 10 == 0 or step % args.log_every == 0 or progress >= 1:  # also keeps the host from running ahead
            value = loss.item()
            if not math.isfinite(value) or (step >= 200 and value > 7.5):
                print(f"step {step}: the loss is {value}; giving up")
                sys.exit(3)
        if step % args.log_every == 0 or progress >= 1:
            shadow.load_state_dict(model.state_dict())
            point = {
                "seconds": round(time.perf_counter() - started, 1),
                "step": step,
                "tokens": step * args.batch * args.length,
                "loss": round(value, 4),
                "held_out_bits_per_byte": round(probe_bits_per_byte(shadow, probe, probe_size), 4),
            }
            curve.append(point)
            print(json.dumps(point), flush=True)
        if progress >= 0.6 and not saved_midway:
            save_file(model.checkpoint(), args.output / "midway.safetensors", metadata={"format": "pt"})
            saved_midway = True
        if progress >= 1:
            break
    elapsed = time.perf_counter() - steady
    record = {
        "seconds_in_all": round(time.perf_counter() - started, 1),
        "steps": step,
        "tokens": step * args.batch * args.length,
        "tokens_per_second": round((step - steady_step) * args.batch * args.length / elapsed),
        "epochs": round(step * (args.batch - batches.recall_rows) * args.length / len(data.train), 2),
        "curve": curve,
    }
    return model, record


def report(config: JetNemotronConfig, data: Data, args: argparse.Namespace, weights: Path) -> dict[str, Any]:
    """eval.json, of the saved weights."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = JetTiny(config, dtype)
    model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    model.to(args.device).eval()
    size = sum(map(len, data.held_out_files))
    documents = [[0, *e.ids] for e in data.tokenizer.encode_batch([f.decode() for f in data.held_out_files])]
    scored = [ids[1:] for ids in documents]
    sample = (DATA / "heldout.txt").read_bytes()
    piece = sample[:SLICE_BYTES]
    rows = RecallTask(data.tokenizer).rows(data.held_out, args.eval_rows, args.length + 1, seed=3)
    result: dict[str, Any] = {
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "held_out_bytes": size,
        "held_out_tokens": sum(map(len, scored)),
        "bits_per_byte": {
            "jet-tiny": evaluate.total_bits(model, documents, args.device) / size,
            **evaluate.compressors(b"".join(data.held_out_files)),
            "token unigram": evaluate.unigram_bits_per_byte(data.train, scored, size, config.vocab_size),
        },
        "heldout.txt": {
            "bytes": len(sample),
            "jet-tiny": evaluate.bits_per_byte(model, data.tokenizer, [sample], args.device),
            **evaluate.compressors(sample),
        },
        f"first {SLICE_BYTES} bytes of heldout.txt": {
            "jet-tiny": evaluate.bits_per_byte(model, data.tokenizer, [piece], args.device),
            **evaluate.compressors(piece),
        },
        "recall": {"all layers": evaluate.recall(model, rows, args.device)},
        "continuation of 'def '": evaluate.greedy(model, data.tokenizer, "def ", 48, args.device),
    }
    for kind in ("jet", "swa", "attn"):
        with evaluate.forgetting(model, kind, config.layer_types):
            result["recall"][f"{kind} forgets every {evaluate.RESET} tokens"] = evaluate.recall(
                model, rows, args.device
            )
    return result


def environment(args: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=DATA)
    return {
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": args.commit or commit.stdout.strip(),
        "triton": triton.__version__,
        "options": {name: getattr(args, name) for name in RECORDED_OPTIONS},
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if args.device == "cuda" else None,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=360, help="from start to last step, compilation included")
    parser.add_argument("--max-steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=250, help="steps")
    parser.add_argument("--recall-pool", type=int, default=12288, help="recall rows generated in advance")
    parser.add_argument("--eval-rows", type=int, default=RECALL_EVAL_ROWS, help="recall rows of the evaluation")
    parser.add_argument("--max-files", type=int, help="of each split")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--commit", help="recorded in training.json if git does not give it")
    parser.add_argument("--evaluate", type=Path, metavar="WEIGHTS", help="only evaluate these weights into eval.json")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to check that everything runs")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.max_steps, args.log_every = 4, 256, 12, 6
        args.recall_pool, args.eval_rows, args.max_files, args.compile = 32, 4, 6, False
    return args


def main() -> None:
    started = time.perf_counter()
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    config = JetNemotronConfig.from_json_file(DATA / "jet-tiny" / "config.json")
    data = load_data(DATA / "jet-tiny", args.corpus, args.max_files)
    print(f"{len(data.train):,} training tokens after {time.perf_counter() - started:.0f} s")
    weights = args.evaluate or args.output / "model.safetensors"
    if not args.evaluate:
        model, record = train(config, data, args, started)
        save_file(model.checkpoint(), weights, metadata={"format": "pt"})
        (args.output / "training.json").write_text(json.dumps({**environment(args), **record}, indent=1) + "\n")
    result = report(config, data, args, weights)
    (args.output / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
