"""Data of the run: jet-tiny's corpus and recall task as files that recipes name. Rebuilt on each machine, not carried.

train.jsonl      whole files of CPython's standard library, jet-tiny's training split
recall.jsonl     rows of the recall task over that split: K72=9183, later K72?9183
heldout.jsonl, heldout-recall.jsonl     the same of the held-out split, which nothing trains on
heldout-code.jsonl     completions: code up to a "self.", and the name that follows, which occurs before it
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
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
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def prepare(output: Path, source: Path, rows: int, most: int | None, say: Callable[[str], None]) -> None:
    """Writes the files. `source`: a directory or a tar with the listed files; `rows`: of recall, for training; `most`:
    files of each split. Raises SystemExit where a split has none."""
    output.mkdir(parents=True, exist_ok=True)
    listing = corpus.read_list(FOLDER / "corpus.json")
    files, wrong = corpus.load(listing, source)
    if wrong:
        say(f"{len(wrong)} of {len(listing['files'])} listed files are absent or differ: {', '.join(wrong[:3])} ...")
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    task = RecallTask(tokenizer)
    for split, names, count, seed in (
        ("train", ("train", "recall"), rows, 11),
        ("heldout", ("heldout", "heldout-recall"), min(rows, 256), 12),
    ):
        texts = [data.decode() for data in corpus.split(listing, files, split)]
        if not texts:
            raise SystemExit(f"{source}: no file of the {split} split. Pass --corpus with {listing['source']}.")
        order = np.random.default_rng(seed).permutation(len(texts))
        texts = [texts[i] for i in order[:most]]
        write(output / f"{names[0]}.jsonl", ({"text": t} for t in texts))
        stream = np.concatenate([np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch(texts)])
        made = task.rows(stream, count, ROW_TOKENS, seed)
        write(
            output / f"{names[1]}.jsonl",
            ({"text": t} for t in tokenizer.decode_batch([r.tokens.tolist() for r in made])),
        )
        say(f"{split}: {len(texts):,} files, {len(stream):,} tokens; {count:,} rows of recall")
    write(output / "heldout-code.jsonl", (c for t in texts for c in completions(t)))
