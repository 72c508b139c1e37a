"""Turns a Qwen2.5 checkpoint and a search's best.json into a Jet model, and trains its JetBlocks for some steps.

    python examples/retrofit.py --checkpoint Qwen2.5-1.5B --config best.json --text corpus.txt --output out --steps 1000
    python examples/retrofit.py --toy out     # makes a toy checkpoint and config first; seconds on a CPU

As in the paper (arXiv 2508.15884) the MLPs, embeddings, norms and the attention of the layers that keep it are copied
and frozen. JetBlocks replace the other layers' attention, are initialised as published, and are the only trained
parameters (next-token loss). `--output` is a checkpoint in the published layout, for `jet-export build --model out`.
docs/guides/retrofit.md describes a full run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jet_tiny.model import JetTiny
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jet_export.bundle.target import target_device
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import check_directory

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
)
SAME = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def check_fits(source: dict, config: JetNemotronConfig, where: Path) -> None:
    """Refuse a checkpoint that is not Qwen2.5, or whose sizes differ from the Jet config's."""
    if source.get("model_type") != "qwen2":
        raise JetExportError(f"{where}: model_type is {source.get('model_type')!r}, not 'qwen2'.")
    ours = {name: getattr(config, name) for name in SAME}
    ours["num_hidden_layers"] = config.num_hidden_layers
    ours["rope_theta"], ours["rms_norm_eps"] = config.rope_theta, config.rms_norm_eps
    for name, value in ours.items():
        if name in source and source[name] != value:
            raise JetExportError(
                f"{where}: {name} is {source[name]}, the Jet config has {value}.",
                "Search from the preset of these sizes: jet-2b for Qwen2.5-1.5B, jet-4b for Qwen2.5-3B.",
            )
    if not (source.get("tie_word_embeddings") and config.tie_word_embeddings):
        raise JetExportError(f"{where}: untied embeddings are not supported here.", "Qwen2.5-1.5B and -3B tie theirs.")


def read_json(path: Path) -> dict:
    """Raises JetExportError if it cannot be read or is not a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise JetExportError(f"--checkpoint: {path} cannot be read.", "Name a directory that Qwen2.5 is in.") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise JetExportError(f"{path}: not a JSON object.", "Download it again.")
    return values


def copied(name: str, config: JetNemotronConfig) -> bool:
    """Whether the tensor is copied from the checkpoint: all but the JetBlocks', whose q_proj, k_proj, v_proj and o_proj
    have Qwen2.5's names but other meanings."""
    parts = name.split(".")
    return not (parts[1] == "layers" and parts[3] == "self_attn" and config.layer_types[int(parts[2])] == "jet")


def source_tensors(directory: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, one at a time. Raises JetExportError naming one that is missing, or a damaged file."""
    left = set(names)
    for path in sorted(directory.glob("*.safetensors")):
        try:
            f = safe_open(path, "pt")
        except (SafetensorError, OSError) as e:
            raise JetExportError(f"{path}: damaged or truncated ({e}).", "Download it again.") from None
        with f:
            for name in sorted(left & set(f.keys())):
                left.remove(name)
                yield name, f.get_tensor(name)
    if left:
        raise JetExportError(f"{directory}: tensor {min(left)} is missing ({len(left)} in all).", "Download it again.")


@torch.no_grad()
def retrofit(checkpoint: Path, config: JetNemotronConfig, dtype: torch.dtype, seed: int) -> JetTiny:
    """The Jet model on the CPU: copied tensors frozen, in the checkpoint's dtype; JetBlocks fp32, to be trained."""
    check_fits(read_json(checkpoint / "config.json"), config, checkpoint / "config.json")
    model = JetTiny(config, dtype)
    model.init_weights(torch.Generator().manual_seed(seed))
    parameters = dict(model.named_parameters())
    wanted = {name for name in parameters if copied(name, config)}
    for name, tensor in source_tensors(checkpoint, wanted):
        if tensor.shape != parameters[name].shape:
            raise JetExportError(
                f"{checkpoint}: {name} is {list(tensor.shape)}, the Jet config asks for {list(parameters[name].shape)}."
            )
        parameters[name].data = tensor
        parameters[name].requires_grad_(False)
    return model


def batches(text: Path | None, checkpoint: Path, config: JetNemotronConfig, rows: int, length: int, seed: int):
    """Endless [rows, length + 1] token ids: excerpts of the text, or arithmetic sequences modulo 16."""
    rng = torch.Generator().manual_seed(seed)
    if text is None:
        while True:
            start, stride = (torch.randint(1, 16, (rows, 1), generator=rng) for _ in range(2))
            yield (start + stride * torch.arange(length + 1)) % 16
    from tokenizers import Tokenizer

    try:
        written = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise JetExportError(f"--text {text}: not UTF-8 (byte {e.start}).") from None
    ids = torch.tensor(Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(written).ids)
    if len(ids) <= length + 1:
        raise JetExportError(f"--text {text}: {len(ids)} tokens, a row takes {length + 1}.", "Pass a longer text.")
    while True:
        starts = torch.randint(len(ids) - length - 1, (rows,), generator=rng)
        yield torch.stack([ids[s : s + length + 1] for s in starts.tolist()])


def loss_of(model: JetTiny, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())


def train(model: JetTiny, data: Iterator[Tensor], steps: int, lr: float, device: str) -> list[float]:
    """AdamW on the JetBlocks; returns the loss before each step."""
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, min(100, steps // 10)))
        loss = loss_of(model, next(data).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step < 10 or (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses


def save(model: JetTiny, config: JetNemotronConfig, checkpoint: Path, output: Path) -> None:
    """A checkpoint in the published layout, with the source's tokenizer and licence."""
    output.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, output / name)
    save_file(model.checkpoint(), output / "model.safetensors", metadata={"format": "pt"})
    config.save(output / "config.json")


TOY: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


def toy_config() -> JetNemotronConfig:
    """As a search might choose: one attention layer kept, one with a window, JetBlocks of two sizes."""
    same = {name: TOY[name] for name in (*SAME, "rope_theta", "rms_norm_eps", "max_position_embeddings")}
    config = JetNemotronConfig(
        **same,
        layer_types=("jet", "attn", "jet", "swa"),
        head_dim=16,
        jet_num_heads=2,
        head_k_dim=16,
        expand_v=2.0,
        window_size=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return config.with_jet_dims({0: JetDims(2, 16, 32), 2: JetDims(4, 16, 16)})


def make_toy(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """A random checkpoint in Qwen2.5's layout, and a Jet config that fits it."""
    checkpoint = directory / "toy-qwen"
    checkpoint.mkdir(parents=True, exist_ok=True)
    model = JetTiny(replace(toy_config(), layer_types=("attn",) * 4, jet_layers=()))
    model.init_weights(torch.Generator().manual_seed(seed))
    save_file(model.checkpoint(), checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "config.json").write_text(json.dumps(TOY, indent=1) + "\n")
    toy_config().save(directory / "best.json")
    return checkpoint, directory / "best.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="Qwen2.5 directory (Hugging Face layout)")
    parser.add_argument("--config", type=Path, help="best.json of jet-export search, or any Jet config.json")
    parser.add_argument("--output", type=Path, help="the Jet checkpoint")
    parser.add_argument("--toy", type=Path, metavar="DIR", help="make a toy checkpoint and config there, and use them")
    parser.add_argument("--text", type=Path, help="UTF-8 text to train on; without it, arithmetic sequences")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.toy or (args.checkpoint and args.config and args.output)):
        parser.error("--checkpoint, --config and --output are needed (or --toy DIR)")
    return args


def check(args: argparse.Namespace) -> None:
    """Raises JetExportError for options that the training or the saving would end at. Makes the toy."""
    for name in ("steps", "batch", "length"):
        if getattr(args, name) < 1:
            raise JetExportError(f"--{name} {getattr(args, name)}: must be at least 1.")
    target_device(args.device.partition(":")[0])
    if args.toy:
        check_directory(args.toy, "--toy")
        args.output = args.output or args.toy / "jet"
    check_directory(args.output)
    if args.text and not args.text.is_file():
        raise JetExportError(f"--text {args.text}: no such file.")
    if args.toy:
        args.checkpoint, args.config = make_toy(args.toy, args.seed)
    if args.text and not (args.checkpoint / "tokenizer.json").is_file():
        raise JetExportError(
            f"--text: {args.checkpoint} has no tokenizer.json.", "Download it, or leave --text out: rows that count."
        )


def main() -> None:
    args = parse_arguments()
    try:
        check(args)
        config = JetNemotronConfig.from_json_file(args.config)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = retrofit(args.checkpoint, config, dtype, args.seed)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        print(f"{frozen:,} parameters copied and frozen, {trained:,} of JetBlocks trained")
        data = batches(args.text, args.checkpoint, config, args.batch, args.length, args.seed)
        train(model, data, args.steps, args.lr, args.device)
        save(model, config, args.checkpoint, args.output)
    except JetExportError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"Next: jet-export build --model {args.output}")


if __name__ == "__main__":
    main()
