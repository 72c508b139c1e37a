"""What a call carries to the next: the run's directory in parts of up to 15 MiB, without what is quickly made again."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jet_export.utils.files import write_atomically

PART_BYTES = 15 << 20
PARTS = "state.tar.gz"
PROGRESS = "progress.json"
REMADE = ("data", "random", "bundle", "state")  # directories of the run that are made again
WHOLE = ("placement", "retrofit")  # steps whose checkpoints nobody needs once they are done
CHECKPOINT_BYTES = 32 << 20  # larger ones stay behind: their training begins again at its last whole stage
CACHE_BYTES = 24 << 20


@dataclass
class Progress:
    """Of the whole run, over all its calls."""

    calls: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # of each call: seconds, commit, processes
    seconds: dict[str, float] = field(default_factory=dict)  # by piece, also of those that are not done
    done: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)  # of the last try

    @classmethod
    def read(cls, run: Path) -> Progress:
        path = run / PROGRESS
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def write(self, run: Path) -> None:
        write_atomically(run / PROGRESS, json.dumps(asdict(self), indent=1) + "\n")


def pack(run: Path, output: Path, say: Callable[[str], None]) -> None:
    """Write `run` to `output` as parts, in place of those that are there."""
    output.mkdir(parents=True, exist_ok=True)
    whole = output / f".{PARTS}"
    with gzip.open(whole, "wb", compresslevel=1) as out, tarfile.open(fileobj=out, mode="w") as tar:
        for path in sorted(carried(run, say)):
            tar.add(path, path.relative_to(run).as_posix(), recursive=False)
    for old in parts(output):
        old.unlink()
    with whole.open("rb") as f:
        for number, part in enumerate(iter(lambda: f.read(PART_BYTES), b"")):
            (output / f"{PARTS}.{number}").write_bytes(part)
    say(f"state: {whole.stat().st_size / 2**20:.1f} MiB in {len(parts(output))} part(s) in {output}")
    whole.unlink()


def unpack(state: Path, run: Path) -> bool:
    """Into `run`, unless what is there is as new. Returns whether it did."""
    found = parts(state)
    if not found:
        return False
    whole = state / f".{PARTS}"
    try:
        whole.write_bytes(b"".join(p.read_bytes() for p in found))
        with tarfile.open(whole) as tar:
            kept: Any = tar.extractfile(PROGRESS)
            if json.load(kept)["calls"] <= Progress.read(run).calls:
                return False
            run.mkdir(parents=True, exist_ok=True)
            tar.extractall(run, filter="data")
    finally:
        whole.unlink(missing_ok=True)
    return True


def parts(state: Path) -> list[Path]:
    """In order."""
    return sorted(state.glob(f"{PARTS}.[0-9]"))


def carried(run: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The files that travel."""
    cache = [p for p in (run / "cache").rglob("*") if p.is_file()]
    if sum(p.stat().st_size for p in cache) <= CACHE_BYTES:
        yield from cache
    left = {p for p in run.rglob("checkpoints/step-*") if _bytes(p) > CHECKPOINT_BYTES}
    if left:
        say(f"not carried, as too large: {', '.join(str(p.relative_to(run)) for p in sorted(left))}")
    left |= {p for step in WHOLE for p in (run / "run" / step).rglob("checkpoints")}
    for path in run.rglob("*"):
        parents = path.relative_to(run).parts
        if path.is_file() and parents[0] not in (*REMADE, "cache") and not left & {path, *path.parents}:
            yield path


def _bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
