"""The corpus: CPython's standard library by a committed list, `jet_export/data/jet-tiny/corpus.json`.

The list names every file with its sha256, its size and its split. The split is fixed by the path alone,
sha256(path) mod 20 == 0 is held out (whole files, never trained on), so that a file keeps its side when the
list is rebuilt from another Python. Left out: generated tables (encodings, topics), files that are not UTF-8,
machine-written configuration, bytewise duplicates, and near-duplicates of a held-out file.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_OF = 20  # one file in twenty
MIN_BYTES, MAX_BYTES = 200, 320_000
SKIPPED_DIRS = ("site-packages", "__pycache__", "config-", "lib-dynload", "encodings", "pydoc_data", "ensurepip")
SKIPPED_PREFIXES = ("_sysconfigdata",)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_held_out(path: str) -> bool:
    return int(sha256(path.encode()), 16) % HELD_OUT_OF == 0


def is_table(text: str) -> bool:
    """More than a quarter of the visible characters are digits: a table, not code."""
    visible = [c for c in text if not c.isspace()]
    return sum(c.isdigit() for c in visible) > 0.25 * max(1, len(visible))


def stdlib_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(path relative to root, bytes) of every file the rules in this module's docstring admit, in order of path."""
    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        path = file.relative_to(root)
        if any(part.startswith(SKIPPED_DIRS) for part in path.parts[:-1]) or path.name.startswith(SKIPPED_PREFIXES):
            continue
        data = file.read_bytes()
        if not MIN_BYTES <= len(data) <= MAX_BYTES:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not is_table(text):
            yield path.as_posix(), data


def line_set(data: bytes) -> set[bytes]:
    return {line.strip() for line in data.splitlines() if len(line.strip()) > 20}


def build_list(root: Path) -> dict:
    """The contents of corpus.json for the standard library at `root`."""
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    for path, data in stdlib_files(root):
        if sha256(data) not in seen:
            seen.add(sha256(data))
            files[path] = data
    lines = {path: line_set(data) for path, data in files.items()}
    held_out = {path for path in files if is_held_out(path)}
    # A training file that shares more than half of a held-out file's longer lines would leak it.
    near = {
        path
        for path in files.keys() - held_out
        for other in held_out
        if len(lines[path] & lines[other]) > 0.5 * max(4, len(lines[other]))
    }
    entries = [
        {"path": p, "sha256": sha256(d), "bytes": len(d), "split": "heldout" if p in held_out else "train"}
        for p, d in files.items()
        if p not in near
    ]
    return {
        "source": f"CPython {platform.python_version()} Lib/",
        "licence": "PSF-2.0",
        "held_out_rule": f"int(sha256(path), 16) % {HELD_OUT_OF} == 0",
        "files": entries,
    }


def read_tree(where: Path) -> dict[str, bytes]:
    """Every .py file under a directory, or in a tar file."""
    if where.is_dir():
        return {f.relative_to(where).as_posix(): f.read_bytes() for f in where.rglob("*.py") if f.is_file()}
    tree = {}
    with tarfile.open(where) as tar:
        for member in tar:
            handle = tar.extractfile(member)
            if handle is not None:
                tree[member.name.removeprefix("./")] = handle.read()
    return tree


def write_tar(where: Path, listing: dict, root: Path) -> None:
    """A snapshot of the listed files, for a machine whose Python is another version."""
    with tarfile.open(where, "w:xz") as tar:
        for entry in listing["files"]:
            data = (root / entry["path"]).read_bytes()
            info = tarfile.TarInfo(entry["path"])
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def load(listing: dict, where: Path) -> tuple[dict[str, bytes], list[str]]:
    """The listed files found at `where` with the listed hash, and the paths that are absent or differ."""
    tree = read_tree(where)
    matching, wrong = {}, []
    for entry in listing["files"]:
        data = tree.get(entry["path"])
        if data is not None and sha256(data) == entry["sha256"]:
            matching[entry["path"]] = data
        else:
            wrong.append(entry["path"])
    return matching, wrong


def split(listing: dict, files: dict[str, bytes], name: str) -> list[bytes]:
    """The files of one split ('train' or 'heldout'), in the list's order."""
    return [files[e["path"]] for e in listing["files"] if e["split"] == name and e["path"] in files]


def read_list(path: Path) -> dict:
    return json.loads(path.read_text())


def format_list(listing: dict) -> str:
    """JSON, one file per line."""
    head = json.dumps({k: v for k, v in listing.items() if k != "files"}, indent=1)
    files = ",\n".join("  " + json.dumps(entry) for entry in listing["files"])
    return head.removesuffix("\n}") + f',\n "files": [\n{files}\n ]\n}}\n'
