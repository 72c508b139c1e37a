"""What the scripts of this folder share on the command line. Imports no torch: some load it in child processes only."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def parser_of(doc: str | None, result: str) -> argparse.ArgumentParser:
    """A parser with --output; `result` names the file that is written without it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"default: benchmarks/results/<gpu>/{result}.json")
    parser.set_defaults(result=result)
    return parser


def output_of(options: argparse.Namespace) -> Path:
    from jet_export.utils.environment import device_slug

    output: Path | None = options.output
    return output or RESULTS / device_slug() / f"{options.result}.json"


def lacks_gpu(script: str) -> bool:
    """Whether there is no GPU to time kernels on; if so, says it."""
    import torch

    if torch.cuda.is_available():
        return False
    print(f"{script} times kernels on a GPU, and torch sees none.", file=sys.stderr)
    return True
