"""Writes jet-tiny's data files from this Python's standard library: corpus list, tokenizer, config, text samples.

    python examples/prepare_jet_tiny.py                          # rebuild jet_export/data (needs CPython 3.11.7's)
    python examples/prepare_jet_tiny.py --snapshot corpus.tar.xz # only pack the listed files, for train_jet_tiny.py

The committed files came from CPython 3.11.7; another version gives another list, and so another model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from jet_tiny import corpus
from jet_tiny.tokenizer import save_tokenizer, train_tokenizer

DATA = Path(__file__).resolve().parent.parent / "jet_export" / "data"
HELD_OUT_BYTES, CALIBRATION_BYTES = 96_000, 64_000

CONFIG: dict[str, Any] = {
    "architectures": ["JetNemotronForCausalLM"],
    "model_type": "jet_nemotron",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 4096,
    "use_mrope": False,
    "torch_dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "layer_types": ["jet", "jet", "swa", "jet", "attn", "jet", "jet"],
    "num_hidden_layers": 7,
    "max_window_layers": 7,
    "efficient_attention_config": {
        "jet": {
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "dconv_implementation": "triton",
            "expand_v": 1,
            "head_dim": 64,
            "mode": "chunk",
            "norm_eps": "1e-5",
            "num_heads": 4,
        },
        "swa": {"window_size": 128},
    },
}


def sample(files: list[bytes], total: int) -> bytes:
    """Whole files of 2 to 16 kB, spread evenly over the list, up to about `total` bytes; one blank line between."""
    middling = [f for f in files if 2_000 <= len(f) <= 16_000]
    average = sum(map(len, middling)) / len(middling)
    step = max(1, int(len(middling) * average / total))
    chosen: list[bytes] = []
    for offset in range(step):
        for data in middling[offset::step]:
            if sum(map(len, chosen)) + len(data) <= total:
                chosen.append(data)
    return b"\n".join(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--data", type=Path, default=DATA, help="folder to write (default: jet_export/data)")
    parser.add_argument("--snapshot", type=Path, help="only write this tar.xz of the committed list's files")
    args = parser.parse_args()
    folder = args.data / "jet-tiny"
    if args.snapshot:
        corpus.write_tar(args.snapshot, corpus.read_list(folder / "corpus.json"), args.stdlib)
        return
    folder.mkdir(parents=True, exist_ok=True)
    listing = corpus.build_list(args.stdlib)
    files, _ = corpus.load(listing, args.stdlib)
    (folder / "corpus.json").write_text(corpus.format_list(listing))
    train, held_out = corpus.split(listing, files, "train"), corpus.split(listing, files, "heldout")
    save_tokenizer(train_tokenizer([f.decode() for f in train]), folder, CONFIG["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (args.data / "heldout.txt").write_bytes(sample(held_out, HELD_OUT_BYTES))
    (args.data / "calibration.txt").write_bytes(sample(train, CALIBRATION_BYTES))
    shutil.copyfile(args.stdlib / "LICENSE.txt", args.data / "LICENSE-PSF.txt")
    print(f"{len(train)} training files, {len(held_out)} held out; wrote {args.data}")


if __name__ == "__main__":
    main()
