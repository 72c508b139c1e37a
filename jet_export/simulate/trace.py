"""Traces of requests: this tool's CSV, and the Azure LLM inference and Mooncake public formats, told by their headers.

CSV         arrival (seconds), prompt, output (tokens), and optionally session
Azure       CSV: TIMESTAMP (a date and time), ContextTokens, GeneratedTokens
            https://github.com/Azure/AzurePublicDataset (AzureLLMInferenceDataset2023.md, ...2024.md)
Mooncake    JSON lines: timestamp (milliseconds), input_length, output_length, hash_ids of blocks of 512 tokens, and
            optionally session_id; https://github.com/kvcache-ai/Mooncake (arXiv 2407.00079)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from jet_export.simulate.load import Arrival
from jet_export.utils.errors import JetExportError

BLOCK = 512  # tokens of one of Mooncake's hash_ids
FORMATS = (
    "Known: CSV with arrival,prompt,output[,session]; Azure's CSV with TIMESTAMP,ContextTokens,GeneratedTokens; "
    "Mooncake's JSON lines with timestamp,input_length,output_length,hash_ids."
)


def read_trace(file: Path, most: int | None = None) -> list[Arrival]:
    """The requests of a trace in order of arrival, the first at 0 s; `most`: no more of them.

    Requests without a token of output, or of prompt, are left out. Raises JetExportError for a file that is no trace,
    with the line.
    """
    try:
        with file.open(encoding="utf-8", newline="") as f:
            found = list(_arrivals(file, f))
    except FileNotFoundError:
        raise JetExportError(f"--trace {file}: no such file.") from None
    except (OSError, UnicodeDecodeError) as e:
        raise JetExportError(f"--trace {file}: cannot be read ({e}).", FORMATS) from None
    found = sorted((a for a in found if a.prompt > 0 and a.output > 0), key=lambda a: a.at)[:most]
    if not found:
        raise JetExportError(f"--trace {file}: holds no request.", FORMATS)
    first = found[0].at
    return [Arrival(a.at - first, a.prompt, a.output, a.session, a.blocks) for a in found]


def _arrivals(file: Path, f: TextIO) -> Iterator[Arrival]:
    read: Callable[[Mapping[str, Any]], Arrival]
    first = f.readline()
    f.seek(0)
    if first.lstrip().startswith("{"):
        rows, read = ((i, _json(file, i, line)) for i, line in enumerate(f, 1) if line.strip()), _mooncake
    else:
        reader = csv.DictReader(f)
        read = _csv_format(file, {name.strip() for name in reader.fieldnames or ()})
        rows = ((i, {str(k).strip(): v for k, v in row.items()}) for i, row in enumerate(reader, 2))
    for i, row in rows:
        try:
            yield read(row)
        except (KeyError, TypeError, ValueError) as e:
            raise JetExportError(f"--trace {file}, line {i}: {type(e).__name__}: {e}.", FORMATS) from None


def _csv_format(file: Path, columns: set[str]) -> Callable[[Mapping[str, Any]], Arrival]:
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return _azure
    if {"arrival", "prompt", "output"} <= columns:
        return _own
    raise JetExportError(
        f"--trace {file}: its header is none of a known format ({', '.join(sorted(columns))}).", FORMATS
    )


def _json(file: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as e:
        raise JetExportError(f"--trace {file}, line {line}: not JSON ({e}).", FORMATS) from None
    if not isinstance(row, dict):
        raise JetExportError(f"--trace {file}, line {line}: not an object.", FORMATS)
    return row


def _own(row: Mapping[str, Any]) -> Arrival:
    return Arrival(float(row["arrival"]), int(row["prompt"]), int(row["output"]), row.get("session") or "")


def _azure(row: Mapping[str, Any]) -> Arrival:
    # 7 digits of a second, which Python 3.11 reads; some of the files have a zone.
    at = datetime.fromisoformat(row["TIMESTAMP"].strip())
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return Arrival(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(row: Mapping[str, Any]) -> Arrival:
    prompt = int(row["input_length"])
    blocks = tuple(int(i) for i in row.get("hash_ids") or ())[: -(-prompt // BLOCK)]
    session = row.get("session_id")
    return Arrival(
        float(row["timestamp"]) / 1e3,
        prompt,
        int(row["output_length"]),
        "" if session is None else str(session),
        blocks if len(blocks) * BLOCK >= prompt else (),
    )
