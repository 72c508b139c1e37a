"""Documents of text, JSONL and parquet files, from any position of theirs.

A position is [file, offset, index]: the file's number, a byte offset in it (of parquet: rows), and how many documents
came before. Every reader yields (text, position after it).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from jet_export.training.recipe import SourceRecipe
from jet_export.utils.errors import JetExportError

Position = tuple[int, int]  # offset, index
Keep = Callable[[int], bool]  # whether the document of this index is wanted
SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


def source_files(source: SourceRecipe) -> list[Path]:
    """The source's files, in the order of their names. Raises JetExportError if there is none."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    else:
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    found = [p for p in found if p.is_file()]
    if not found:
        raise JetExportError(
            f"data source {source.name}: {source.path} names no file.",
            f"Give a file, a directory or a glob; read here: {', '.join(SUFFIXES)}.",
        )
    return found


def format_of(source: SourceRecipe, file: Path) -> str:
    if source.format != "auto":
        return source.format
    if file.suffix not in SUFFIXES:
        raise JetExportError(
            f"data source {source.name}: {file} has a suffix that is not known.",
            f"Known: {', '.join(SUFFIXES)}. Or say what it is: format = text, jsonl or parquet.",
        )
    return SUFFIXES[file.suffix]


def read_documents(
    source: SourceRecipe, file: Path, start: Position, keep: Keep, piece_bytes: int
) -> Iterator[tuple[str | None, Position]]:
    """The file's documents from `start` on; None in place of those that `keep` does not want. Raises JetExportError
    naming the file, and the line or row, that cannot be read."""
    kind = format_of(source, file)
    try:
        if kind == "parquet":
            yield from _parquet(source, file, start, keep)
        elif kind == "jsonl":
            yield from _jsonl(source, file, start, keep)
        else:
            yield from _text(source, file, start, keep, piece_bytes)
    except OSError as e:
        raise JetExportError(
            f"data source {source.name}: {file} cannot be read ({e.strerror or type(e).__name__}).", WHAT_NEXT
        ) from None


WHAT_NEXT = "Repair the file, or move it away, and go on with --resume."


def _jsonl(source: SourceRecipe, file: Path, start: Position, keep: Keep) -> Iterator[tuple[str | None, Position]]:
    offset, index = start
    with file.open("rb") as f:
        f.seek(offset)
        for line in f:
            at, offset = offset, offset + len(line)
            if not line.strip():
                continue
            text = _field(source, file, line, at) if keep(index) else None
            index += 1
            yield text, (offset, index)


def _field(source: SourceRecipe, file: Path, line: bytes, at: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, UnicodeDecodeError):
        raise JetExportError(
            f"data source {source.name}: {file}, byte {at}: a line that is not JSON.", WHAT_NEXT
        ) from None
    text = value.get(source.field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise JetExportError(
            f"data source {source.name}: {file}, byte {at}: no string under {source.field!r}; the line has: {has}.",
            "Set the source's field in the recipe.",
        )
    return text


def _text(
    source: SourceRecipe, file: Path, start: Position, keep: Keep, piece_bytes: int
) -> Iterator[tuple[str | None, Position]]:
    """Documents end at a line that ends with the separator, or at the first line end past `piece_bytes`."""
    offset, index = start
    separator = source.separator.encode()
    lines: list[bytes] = []
    size = 0
    with file.open("rb") as f:
        f.seek(offset)
        for line in f:
            offset += len(line)
            found = bool(separator) and line.rstrip().endswith(separator)
            lines.append(line.rstrip().removesuffix(separator) if found else line)
            size += len(lines[-1])
            if (found or size >= piece_bytes) and (document := _decoded(source, file, lines, offset, keep(index))):
                lines, size, index = [], 0, index + 1
                yield document[0], (offset, index)
            elif found:
                lines, size = [], 0
    if document := _decoded(source, file, lines, offset, keep(index)):
        yield document[0], (offset, index + 1)


def _decoded(source: SourceRecipe, file: Path, lines: list[bytes], end: int, wanted: bool) -> tuple[str | None] | None:
    """The document of these lines, (None,) if it is not wanted; None if they are blank."""
    whole = b"".join(lines)
    if not whole.strip():
        return None
    try:
        return (whole.decode("utf-8"),) if wanted else (None,)
    except UnicodeDecodeError as e:
        at = end - len(whole) + e.start
        raise JetExportError(f"data source {source.name}: {file}, byte {at}: not UTF-8.", WHAT_NEXT) from None


def _parquet(source: SourceRecipe, file: Path, start: Position, keep: Keep) -> Iterator[tuple[str | None, Position]]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise JetExportError(f"data source {source.name}: {file} needs pyarrow.", "pip install pyarrow.") from None
    from pyarrow.lib import ArrowException

    offset, index = start
    try:
        table = pq.ParquetFile(file)
        if source.field not in table.schema_arrow.names:
            raise JetExportError(
                f"data source {source.name}: {file} has no column {source.field!r}.",
                f"Its columns: {', '.join(table.schema_arrow.names)}. Set the source's field in the recipe.",
            )
        before = 0  # rows of the groups before
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if before + rows > offset:
                column = table.read_row_group(group, columns=[source.field]).column(0)
                for row in range(offset - before, rows):
                    text = column[row].as_py() if keep(index) else None
                    offset, index = offset + 1, index + 1
                    yield text or (None if text is None else ""), (offset, index)
            before += rows
    except (ArrowException, OSError) as e:
        said = str(e).partition("\n")[0].rstrip(".")
        raise JetExportError(
            f"data source {source.name}: {file}: damaged or not parquet ({said}).", WHAT_NEXT
        ) from None
