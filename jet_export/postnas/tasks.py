"""Tasks: what candidates are compared by, as tokens of which some are scored.

An item is one sequence; its answers are spans of tokens that follow from those before them. A next-token loss scores
all tokens but the first, as one span; recall and completion score the answers, each right where all of its tokens are
the most likely ones, which is where greedy decoding is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_export.postnas.recipe import TaskRecipe
from jet_export.training.data.rows import IGNORED, Row
from jet_export.training.data.shard import BYTES_PER_TOKEN, Encode
from jet_export.training.data.sources import FileSource
from jet_export.training.recipe import SourceRecipe
from jet_export.utils.errors import JetExportError

DEFINITION, QUERY = re.compile(r"(?m)^([A-Z]\d\d)=\d{4}$"), re.compile(r"(?m)^([A-Z]\d\d)\?(\d{4})")


@dataclass(frozen=True)
class Item:
    """One sequence and the spans [start, stop) of its tokens that are scored; start >= 1."""

    tokens: list[int]
    spans: list[tuple[int, int]]

    def row(self, length: int) -> Row:
        """Padded to `length` by a sequence of its own; labels at the scored tokens alone."""
        labels = [IGNORED] * length
        for start, stop in self.spans:
            labels[start - 1 : stop - 1] = self.tokens[start:stop]
        padding = length - len(self.tokens)
        return Row([*self.tokens, *[0] * padding], labels, [len(self.tokens), *([padding] if padding else [])])


@dataclass(frozen=True)
class Task:
    recipe: TaskRecipe
    items: list[Item]

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def counts_answers(self) -> bool:
        """Whether accuracy is what counts (else the loss)."""
        return self.recipe.kind != "loss"


def load_task(recipe: TaskRecipe, encode: Encode, ends: bool, length: int) -> Task:
    """`ends`: `encode` puts an end token behind each text. `length`: tokens of an item where the recipe has none.

    Raises JetExportError for a file that cannot be read or gives no item."""

    def tokens(text: str) -> list[int]:
        return encode(text)[: -1 if ends else None]

    limit = recipe.length or length
    reader = {"loss": _text, "recall": _recall, "completion": _completion}[recipe.kind]
    items = []
    for item in reader(recipe, tokens, limit):
        if item.spans:
            items.append(item)
        if len(items) == recipe.items:
            break
    if not items:
        raise JetExportError(
            f"task {recipe.name}: {recipe.path} gives no item of up to {limit} tokens with something to score.",
            "Raise its length, or give it other data; docs/guides/postnas.md describes the kinds.",
        )
    return Task(recipe, items)


def _text(recipe: TaskRecipe, tokens: Encode, limit: int) -> Iterator[Item]:
    source = FileSource(
        SourceRecipe(name=f"task {recipe.name}", path=recipe.path, field=recipe.field), 0, 1, BYTES_PER_TOKEN * limit
    )
    for text in source.documents():
        if source.state["epoch"]:
            return
        ids = tokens(text)
        for start in range(0, len(ids), limit):
            piece = ids[start : start + limit]
            if len(piece) > 1:
                yield Item(piece, [(1, len(piece))])


def _recall(recipe: TaskRecipe, tokens: Encode, limit: int) -> Iterator[Item]:
    """Values are encoded on their own, so that their tokens can be told from the text's."""
    for line in _lines(recipe):
        text = _field(recipe, line, recipe.field)
        defined = {m[1]: m.start() for m in reversed(list(DEFINITION.finditer(text)))}
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        done = 0
        for m in QUERY.finditer(text):
            if defined.get(m[1], m.start()) >= m.start():
                continue
            ids += tokens(text[done : m.start(2)])
            answer = tokens(m[2])
            spans.append((len(ids), len(ids) + len(answer)))
            ids, done = ids + answer, m.end()
        ids += tokens(text[done:])
        yield Item(ids[:limit], [s for s in spans if s[1] <= limit])


def _completion(recipe: TaskRecipe, tokens: Encode, limit: int) -> Iterator[Item]:
    """Long prompts lose their beginning."""
    for line in _lines(recipe):
        answer = tokens(_field(recipe, line, recipe.answer_field))
        prompt = tokens(_field(recipe, line, recipe.prompt_field))[-max(1, limit - len(answer)) :]
        ids = prompt + answer
        yield Item(ids[:limit], [(len(prompt), len(ids))] if prompt and answer and len(ids) <= limit else [])


def _lines(recipe: TaskRecipe) -> Iterator[dict[str, Any]]:
    path = Path(recipe.path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise JetExportError(f"task {recipe.name}: {path} cannot be read ({e}).", "Give it a JSONL file.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise JetExportError(f"task {recipe.name}: {path}, line {number}: not a JSON object.", "Repair it.")
        yield value


def _field(recipe: TaskRecipe, line: dict[str, Any], name: str) -> str:
    text = line.get(name)
    if not isinstance(text, str):
        raise JetExportError(
            f"task {recipe.name}: a line of {recipe.path} has no string under {name!r}; it has: {', '.join(line)}.",
            "Set field, or prompt_field and answer_field.",
        )
    return text
