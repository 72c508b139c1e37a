"""benchmarks/results/INDEX.md: each speed or time that README.md and docs/ quote, with the results file that it stands
in, its commit and its command.

    python benchmarks/tools/results_index.py            # writes INDEX.md; exit status 1 if a figure has no row
    python benchmarks/tools/results_index.py --check    # writes nothing, and also fails if INDEX.md is out of date

A figure is looked up in the files that its section names: by a path or link, or in a comment that readers do not see,
`<!-- results: h100/kernels.json h200/bench-* -->`, which holds to the next comment or heading; relative to
benchmarks/results, a folder means all files in it. The figure must be there as it is quoted: to the last digit, in the
quoted unit or in seconds. What is computed, cited or seen without a file stands in benchmarks/results/figures.toml,
with the reason.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
INDEX, NOTES = RESULTS / "INDEX.md", RESULTS / "figures.toml"
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
# unit -> what a value of a file is multiplied with to be in it
UNITS = {
    "tokens/s": (1.0,),
    "ms": (1.0, 1e3, 1e-3),
    "µs": (1.0, 1e3, 1e6),
    "s": (1.0, 1e-3),
    "TB/s": (1.0, 1e-12),
}
SPELLED = {"tok/s": "tokens/s", "us": "µs", "milliseconds": "ms", "microseconds": "µs"}
UNIT = "|".join([*(u for u in UNITS if u != "s"), *SPELLED])
BETWEEN = r"(?:, | and | to | or |/|; )"
PROSE = re.compile(
    rf"(?<![\w.,])((?:(?:{NUMBER}){BETWEEN})*(?:{NUMBER}))\s+(?:new |output )?({UNIT}|s)\b", re.IGNORECASE
)
NAMED = re.compile(rf"\b({UNIT})(?![\w/])", re.IGNORECASE)
CELL = re.compile(rf"(?<![\w.,-])({NUMBER})(?!\w|[.,]\d| ?%|e-| logprobs)")
COMMENT = re.compile(r"<!-- results: (.*?) -->", re.DOTALL)
PATH = re.compile(r"benchmarks/results/([\w./*-]+)")


@dataclass(frozen=True)
class Figure:
    """As quoted. `section`: the headings above it, joined."""

    document: str
    section: str
    number: str
    unit: str

    def __str__(self) -> str:
        return f"{self.number} {self.unit}"

    def stands_in(self, values: tuple[float, ...]) -> bool:
        """Whether a value is this figure, rounded as it is quoted."""
        digits = len(self.number.partition(".")[2])
        quoted, half = float(self.number.replace(",", "")), 0.5 * 10**-digits * (1 + 1e-6)
        return any(abs(value * scale - quoted) <= half for value in values for scale in UNITS[self.unit])


@dataclass(frozen=True)
class Source:
    """`values`: all numbers of the file."""

    name: str
    commit: str
    command: str
    values: tuple[float, ...]


@dataclass
class Part:
    """Of a document, without code: a section, or what follows a comment in one. `files`: of benchmarks/results; if it
    names none, those of the section around it."""

    title: str
    text: str
    files: tuple[str, ...]


def documents() -> list[Path]:
    """All but the command line's reference, whose numbers are defaults."""
    return [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name != "cli.md")]


def parts(text: str) -> Iterator[Part]:
    """Code blocks are left out; the paths in them are not."""
    above: list[tuple[int, str, tuple[str, ...]]] = []
    split = re.split(r"^(#+) (.*)$", _without_code(text), flags=re.MULTILINE)
    for level, title, body in [("", "", split[0]), *zip(split[1::3], split[2::3], split[3::3], strict=True)]:
        above = [entry for entry in above if entry[0] < len(level)]
        begin, *commented = COMMENT.split(body)
        above.append((len(level), title, _files(begin)))
        nearest = next((files for *_, files in reversed(above) if files), ())
        name = " / ".join([t for _, t, _ in above if t][1:]) or "the beginning"
        yield Part(name, begin, nearest)
        for comment, rest in zip(commented[::2], commented[1::2], strict=True):
            yield Part(name, rest, _files(rest, comment))


def _files(text: str, comment: str = "") -> tuple[str, ...]:
    named = [name.rstrip(".") for name in (*PATH.findall(text), *comment.split())]
    return tuple(dict.fromkeys(file for name in named for file in files_of(name)))


def _without_code(text: str) -> str:
    """A block's paths stay, behind a mark that ends no part."""
    return re.sub(
        r"^```.*?^```",
        lambda m: "".join(f"(benchmarks/results/{p})\n" for p in PATH.findall(m[0])),
        text,
        flags=re.M | re.S,
    )


def files_of(name: str) -> list[str]:
    """JSON files that a path, pattern or folder of benchmarks/results means; none for the folder of a GPU."""
    found = [path for pattern in (name, f"{name.rstrip('/')}/*.json") for path in RESULTS.glob(pattern.lstrip("/"))]
    deep = [p for p in found if p.suffix == ".json" and ("/" in name.strip("/") or p.parent == RESULTS)]
    return sorted(str(p.relative_to(RESULTS)) for p in deep)


def figures(document: str, part: Part) -> Iterator[Figure]:
    """Numbers with a unit, and those of tables whose heading or introduction names one."""
    seen: set[tuple[str, str]] = set()
    before = ""
    for block in re.split(r"\n\s*\n", part.text):
        lines = block.strip().splitlines()
        table = bool(lines) and all(line.lstrip().startswith("|") for line in lines) and len(lines) > 2
        for number, unit in _of_table(lines, before) if table else _of_prose(block):
            if (number, unit) not in seen:
                seen.add((number, unit))
                yield Figure(document, part.title, number, unit)
        before = block


def _of_prose(text: str) -> Iterator[tuple[str, str]]:
    for numbers, unit in PROSE.findall(text):
        for number in re.split(BETWEEN, numbers):
            if unit != "s" or "." in number:  # whole seconds are settings
                yield number, SPELLED.get(unit.lower(), unit.lower().replace("tb/s", "TB/s"))


def _of_table(lines: list[str], before: str) -> Iterator[tuple[str, str]]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    default = _unit(before.strip().splitlines()[-1] if before.strip() else "")
    headings = [_unit(cell) for cell in rows[0]]
    some = any(headings)
    for row in rows[2:]:
        for i, cell in enumerate(row):
            yield from _of_prose(cell)
            own = headings[i] if some and i < len(headings) else default
            label = _unit(row[0]) if i and not some else None
            unit = own or label
            if unit and i and not PROSE.search(cell):
                for number in CELL.findall(re.sub(r"\([^)]*\)|B\d+:", "", cell)):
                    yield number, unit


def _unit(text: str) -> str | None:
    found = NAMED.search(text)
    return SPELLED.get(found[1].lower(), found[1].lower()) if found else None


@cache
def notes() -> dict[str, Any]:
    return tomllib.loads(NOTES.read_text(encoding="utf-8"))


@cache
def source(name: str) -> Source:
    """Commit and command of a file that does not say them are in figures.toml."""
    data = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    where, told = data.get("environment", {}), notes().get("files", {}).get(name, {})
    commit = str(where.get("commit") or data.get("commit") or told.get("commit", ""))
    return Source(name, commit, str(data.get("command") or told.get("command", "")), tuple(_numbers(data)))


def _numbers(data: Any) -> Iterator[float]:
    if isinstance(data, bool):
        return
    if isinstance(data, int | float):
        yield float(data)
    elif isinstance(data, dict):
        for value in data.values():
            yield from _numbers(value)
    elif isinstance(data, list):
        for value in data:
            yield from _numbers(value)


@dataclass(frozen=True)
class Row:
    """`source`: a results file, or `why` there is none."""

    figure: Figure
    source: Source | None
    why: str = ""


def rows_and_missing() -> tuple[list[Row], list[Figure]]:
    rows, missing = [], []
    for path in documents():
        document = str(path.relative_to(ROOT))
        elsewhere = notes().get("elsewhere", {}).get(document, {})
        for part in parts(path.read_text(encoding="utf-8")):
            quoted = list(figures(document, part))
            # A file with many of a part's figures is where the others are from too.
            sources = sorted(map(source, part.files), key=lambda s: -sum(f.stands_in(s.values) for f in quoted))
            for figure in quoted:
                found = next((s for s in sources if figure.stands_in(s.values)), None)
                if found or str(figure) in elsewhere:
                    rows.append(Row(figure, found, elsewhere.get(str(figure), "")))
                else:
                    missing.append(figure)
    return rows, missing


def rendered(rows: list[Row]) -> str:
    lines = ["# Figures and where they come from", "", "Written by `python benchmarks/tools/results_index.py`.", ""]
    for document in dict.fromkeys(row.figure.document for row in rows):
        lines += [f"## {document}", "", "| section | figure | from | commit |", "|---|---|---|---|"]
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.figure.document == document:
                key = row.source.name if row.source else row.why
                groups.setdefault((row.figure.section, key), []).append(row)
        for (section, key), group in groups.items():
            quoted = "; ".join(str(row.figure) for row in group)
            first = group[0].source
            name = f"[{key}]({key})" if first else key
            lines.append(f"| {section.replace('|', '/')} | {quoted} | {name} | {first.commit if first else '–'} |")
        lines.append("")
    lines += ["## Commands", "", "| file | commit | command |", "|---|---|---|"]
    for name in sorted({row.source.name for row in rows if row.source}):
        s = source(name)
        lines.append(f"| [{name}]({name}) | {s.commit} | `{s.command.replace('|', '¦')}` |")
    return "\n".join(lines) + "\n"


def complaints(rows: list[Row], missing: list[Figure]) -> list[str]:
    """What keeps the index from being complete."""
    bare = sorted({row.source.name for row in rows if row.source and not (row.source.commit and row.source.command)})
    return [
        *(f"{f.document}, {f.section}: {f} stands in no results file that the section names" for f in missing),
        *(f"{name}: no commit or no command; add them under [files] in figures.toml" for name in bare),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    rows, missing = rows_and_missing()
    wrong = complaints(rows, missing)
    if not check:
        INDEX.write_text(rendered(rows), encoding="utf-8")
    elif INDEX.read_text(encoding="utf-8") != rendered(rows):
        wrong.append("INDEX.md is out of date; run benchmarks/tools/results_index.py")
    print("\n".join(wrong) or f"{len(rows)} figures")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
