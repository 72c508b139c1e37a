"""PostNAS shown on one GPU, in calls of a few minutes: benchmarks/postnas/README.md has the plan and the budget.

    python examples/prepare_jet_tiny.py --snapshot runs/corpus.tar.xz      # on a machine with CPython 3.11.7
    python benchmarks/postnas/shown.py --plan                              # the pieces and what they should take
    python benchmarks/postnas/shown.py --output runs/shown --corpus runs/corpus.tar.xz --minutes 8
        [--state runs/state] [--save DIR]      # again until it says done
    python benchmarks/postnas/shown.py --output runs/toy-shown --toy       # every piece, tiny, on a CPU

A call goes on where --output, or what --state brings along if that is newer, leaves off. It runs the next pieces that
fit --minutes, stops in time, and writes what the next call needs to --save (default: OUTPUT/state), in parts of 15 MiB.
A file a piece under OUTPUT/pieces; shown.json and shown.md at the end of every call. Status 1: a piece failed.

Needs torch, triton, numpy, safetensors, tokenizers, huggingface_hub, typer and rich alone. Wheels for more, where they
are missing: piece engine builds FP8 with nvidia-modelopt (omegaconf, antlr4-python3-runtime, pulp, pydantic,
pydantic_core, annotated_types, typing_inspection too) and bf16 without. report.html needs plotly, and is made elsewhere
from the same state.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/shown"))
    parser.add_argument("--minutes", type=float, default=8, help="of this call, from its start")
    parser.add_argument(
        "--corpus", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="a directory or a tar"
    )
    parser.add_argument("--state", type=Path, help="what the last call saved")
    parser.add_argument("--save", type=Path, help="where this one saves")
    parser.add_argument("--only", default="", help="pieces, with commas")
    parser.add_argument("--skip", default="", help="pieces, with commas")
    parser.add_argument("--seeds", type=int, default=3, help="of piece compare")
    parser.add_argument("--rows", type=int, default=8_000, help="of the recall task, for training")
    parser.add_argument("--parallel", type=int, default=1, help="candidates that train side by side")
    parser.add_argument("--eager", action="store_true", help="no torch.compile, which the recipes ask for")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
    parser.add_argument("--toy", action="store_true", help="every piece at a size for a CPU; figures mean nothing")
    args = parser.parse_args()
    if args.toy:
        args.rows, args.seeds = 32, 2
    return args


def main() -> int:
    began, args = time.monotonic(), arguments()
    cache = (args.output / "cache").absolute()  # travels: a bare machine compiles nothing twice
    if not args.plan:
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    from driver import Call

    return Call(args, began + 60 * args.minutes).run()


if __name__ == "__main__":
    sys.exit(main())
