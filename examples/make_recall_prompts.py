"""Writes jet_export/data/recall.jsonl: held-out code with key-value lines in it, for `jet-export verify`.

    python examples/make_recall_prompts.py

Each line is {"text": ...} of ROW_TOKENS jet-tiny tokens; K72=9183 defines, K72?9183 further down asks (see
jet_tiny/recall.py).
"""

import json
from pathlib import Path

import numpy as np
from jet_tiny.recall import RecallTask
from tokenizers import Tokenizer

DATA = Path(__file__).resolve().parent.parent / "jet_export" / "data"
ROWS, ROW_TOKENS, SEED = 8, 2040, 7


def main() -> None:
    tokenizer = Tokenizer.from_file(str(DATA / "jet-tiny" / "tokenizer.json"))
    code = np.array(tokenizer.encode((DATA / "heldout.txt").read_text(encoding="utf-8")).ids)
    with (DATA / "recall.jsonl").open("w", encoding="utf-8") as out:
        for row in RecallTask(tokenizer).rows(code, ROWS, ROW_TOKENS, SEED):
            text = tokenizer.decode(row.tokens.tolist(), skip_special_tokens=False)
            assert tokenizer.encode(text).ids == row.tokens.tolist(), "the text does not tokenise to the same tokens"
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
