"""Data for the H200 run: jet-tiny's corpus and recall task as files that recipes name.

    python benchmarks/postnas/prepare.py --output runs/postnas-data [--corpus DIR_OR_TAR]

train.jsonl      whole files of CPython's standard library, jet-tiny's training split
recall.jsonl     rows of the recall task over that split: K72=9183, later K72?9183
heldout.jsonl, heldout-recall.jsonl     the same of the held-out split, which nothing trains on
heldout-code.jsonl     completions: code up to a "self." or "def ", and the name that follows, which occurs before it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from jet_tiny import corpus
from jet_tiny.recall import RecallTask

FOLDER = Path(__file__).resolve().parents[2] / "jet_export/data/jet-tiny"
ROW_TOKENS = 1000
NAME = re.compile(r"\bself\.(\w{4,})")
PROMPT_CHARACTERS = 2000


def completions(text: str) -> Iterator[dict[str, str]]:
    """Of each name behind a "self.", its second occurrence and each tenth from there on."""
    seen: dict[str, int] = {}
    for match in NAME.finditer(text):
        count = seen[match[1]] = seen.get(match[1], 0) + 1
        if count % 10 == 2:
            start = match.start(1)
            yield {"prompt": text[max(0, start - PROMPT_CHARACTERS) : start], "answer": match[1]}


def write(path: Path, lines: Iterable[dict[str, str]]) -> None:
    text = [json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(text), encoding="utf-8")
    print(f"{path}: {len(text):,} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--rows", type=int, default=20_000, help="of the recall task, for training")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    listing = corpus.read_list(FOLDER / "corpus.json")
    files, wrong = corpus.load(listing, args.corpus)
    if wrong:
        print(f"{len(wrong)} of {len(listing['files'])} listed files are absent or differ: {', '.join(wrong[:3])} ...")
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    task = RecallTask(tokenizer)
    for split, names, rows, seed in (
        ("train", ("train", "recall"), args.rows, 11),
        ("heldout", ("heldout", "heldout-recall"), 256, 12),
    ):
        texts = [data.decode() for data in corpus.split(listing, files, split)]
        if not texts:
            raise SystemExit(f"{args.corpus}: no file of the {split} split. Pass --corpus with {listing['source']}.")
        order = np.random.default_rng(seed).permutation(len(texts))
        texts = [texts[i] for i in order]
        write(args.output / f"{names[0]}.jsonl", ({"text": t} for t in texts))
        stream = np.concatenate([np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch(texts)])
        made = (tokenizer.decode(r.tokens.tolist()) for r in task.rows(stream, rows, ROW_TOKENS, seed))
        write(args.output / f"{names[1]}.jsonl", ({"text": t} for t in made))
    write(args.output / "heldout-code.jsonl", (c for t in texts for c in completions(t)))


if __name__ == "__main__":
    main()
