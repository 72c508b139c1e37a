"""Bits per byte over a text, and completion of its lines."""

from __future__ import annotations

import difflib
import random
import re
from typing import Any

from jet_export.evaluation.tasks.settings import Documents, TaskSettings, documents, token_counts
from jet_export.utils.errors import JetExportError

PIECE_BYTES = 4096  # of a document; the standard error needs several
LINES = 200
CONTEXT_TOKENS = 448  # before the line that is completed
COMPLETION_TOKENS = 48
LINE = re.compile(r"^\s*\w[\w.]*\W+\w+.*\S$")


def pieces(**metadata: Any) -> Documents:
    """The text in documents of about 4 KB, cut at line ends."""
    found, piece = [], ""
    for line in TaskSettings.of(metadata).read_text().splitlines(keepends=True):
        piece += line
        if len(piece.encode()) >= PIECE_BYTES:
            found.append(piece)
            piece = ""
    if piece.strip():
        found.append(piece)
    return documents([{"text": p} for p in found])


def lines(**metadata: Any) -> Documents:
    """Lines of the text, each with the lines before it and its own first half, to be completed."""
    settings = TaskSettings.of(metadata)
    rows = settings.read_text().splitlines()
    counts = token_counts(settings.tokenizer, rows)
    candidates = [i for i, row in enumerate(rows) if 16 <= len(row.strip()) <= 80 and LINE.match(row) and i >= 8]
    if not candidates:
        raise JetExportError("code_completion: no line of the text can be completed.", "Give another --text.")
    rng = random.Random("code_completion")
    chosen = sorted(rng.sample(candidates, min(LINES, len(candidates))))
    rng.shuffle(chosen)
    room = min(CONTEXT_TOKENS, settings.max_length - COMPLETION_TOKENS - 64)
    return documents([_completion(rows, counts, i, room) for i in chosen])


def _completion(rows: list[str], counts: list[int], i: int, room: int) -> dict[str, Any]:
    first, used = i, 0
    while first > 0 and used + counts[first - 1] <= room:
        first -= 1
        used += counts[first]
    row = rows[i]
    start = len(row) - len(row.lstrip())
    middle = start + (len(row) - start) // 2
    ends = [m.end() for m in re.finditer(r"\w+|[^\w\s]", row)]
    cut = min((e for e in ends if e < len(row)), key=lambda e: abs(e - middle))
    return {"context": "\n".join([*rows[first:i], row[:cut]]), "rest": row[cut:]}


def score_line(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the rest of the line is right, and its similarity (difflib's ratio), white space at its ends aside."""
    found, expected = results[0].strip(), document["rest"].strip()
    ratio = difflib.SequenceMatcher(None, found, expected, autojunk=False).ratio()
    return {"exact_match": float(found == expected), "edit_similarity": ratio}
