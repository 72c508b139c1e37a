"""Load on a server by AIPerf, NVIDIA's client: `make load`, which gives AIPerf (the extra `load`) its own environment.

    python benchmarks/serving/aiperf_load.py BUNDLE --aiperf build/load/bin/aiperf --output DIR

Serves the bundle as users do (`jet-export serve --openai`) and runs `aiperf profile` against it: streams at once that
each wait for their answer, prompts of random words. AIPerf's tables go to the terminal and its files to DIR.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from jet_export.bundle.manifest import Manifest
from jet_export.model.hf_files import tokenizer_directory

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")  # AIPerf refuses a directory with them


@contextmanager
def served(bundle: Path):
    """The address of a server of the bundle."""
    command = [str(Path(sys.executable).with_name("jet-export")), "serve", str(bundle), "--openai", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("POST "):
                yield line.split()[1].removesuffix("/v1/completions")
                break
        else:
            sys.exit("The server did not start.")
    finally:
        process.terminate()
        process.communicate()


def profile(args: argparse.Namespace, address: str) -> int:
    """AIPerf's exit status."""
    environment = {k: v for k, v in os.environ.items() if k not in OFFLINE}
    options = {
        "--model": str(Manifest.load(args.bundle).model["name"]),
        "--url": address,
        "--endpoint-type": "completions",
        "--tokenizer": str(tokenizer_directory(args.bundle).resolve()),
        "--concurrency": args.streams,
        "--request-count": args.requests,
        "--isl": args.prompt_tokens,
        "--osl": args.output_tokens,
        "--extra-inputs": "ignore_eos:true",
        "--output-artifact-dir": str(args.output),
        "--ui": "simple",
    }
    command = [
        str(args.aiperf),
        "profile",
        "--streaming",
        "--use-server-token-count",
        *(str(x) for option in options.items() for x in option),
    ]
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--aiperf", type=Path, default="aiperf", help="the program")
    parser.add_argument("--output", type=Path, default=Path("build/aiperf"))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    args = parser.parse_args()
    with served(args.bundle) as address:
        return profile(args, address)


if __name__ == "__main__":
    sys.exit(main())
