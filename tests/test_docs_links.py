"""Documents and docstrings name files, scripts and modules of the repository that are there.

A path is one of ours if its first part is a folder of the repository or of the document's own folder; what users have
(`bundles/`, `out/`) begins with neither, even if it lies in the checkout. What a command writes, after --output, need
not be there. A part in capitals or angle brackets stands for any.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import ROOT

FOLDERS = ["jet_export", "kernels", "model", "plugins", "tests", "examples", "benchmarks", "docs"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted(
    # INDEX.md quotes commands of earlier commits.
    [ROOT / "README.md", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.md") if p.name != "INDEX.md")],
    key=lambda path: path.relative_to(ROOT).parts,
)
SCRIPTS = {path.name for path in SOURCES}
CITING = ("kernels", "model")  # their docstrings cite files of other projects by their names alone
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OUTPUT = re.compile(r"--(output|report|directory)[= ]\S+")
PATH = re.compile(r"(?<![\w./~$:{-])[\w.-]+(?:/[\w.*<>-]+)+/?")
PLACEHOLDER = re.compile(r"<\w+>|(?<=/)[A-Z]+(?=/|$)")
SCRIPT = re.compile(r"(?<![\w./-])[a-z]\w*\.py\b")
MODULE = re.compile(r"(?<![\w./-])jet_export(?:\.\w+)+\b(?!\()")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def missing_paths(text: str, folder: Path) -> Iterator[str]:
    """Paths of ours in the text that lead nowhere."""
    for found in PATH.findall(OUTPUT.sub("", text)):
        path = PLACEHOLDER.sub("*", found.rstrip("./"))
        first = path.split("/")[0]
        bases = [b for b in {ROOT, folder} if (b != ROOT or first in FOLDERS) and (b / first).is_dir()]
        if bases and not any(any(base.glob(path)) for base in bases):
            yield found


def missing_scripts(text: str) -> Iterator[str]:
    yield from (script for script in SCRIPT.findall(text) if script not in SCRIPTS)


def missing_modules(text: str) -> Iterator[str]:
    """Modules that are not there, or have no such name."""
    for found in MODULE.findall(text):
        parts = found.split(".")[1:]
        root = ROOT if parts[0] in FOLDERS else ROOT / "jet_export"
        depth = next((n for n in range(len(parts), 0, -1) if module_file(root, parts[:n])), 0)
        file = module_file(root, parts[:depth]) if depth else ROOT / "jet_export/__init__.py"
        rest = parts[depth:]
        if rest and (file is None or not re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8"))):
            yield found


def module_file(root: Path, parts: list[str]) -> Path | None:
    path = root.joinpath(*parts)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py", path) if p.exists()), None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t for t in LINK.findall(text) if "://" not in t]
    assert not [t for t in targets if not (document.parent / t.split("#")[0]).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_a_document_names_what_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    code = "\n".join(CODE.findall(text))
    found = [*missing_paths(text, document.parent), *missing_scripts(code), *missing_modules(code)]
    assert not found


def docstrings_of(source: Path) -> str:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n".join(ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, nodes))


def test_docstrings_name_what_is_there() -> None:
    missing = {}
    for source in SOURCES:
        text, folder = docstrings_of(source), source.relative_to(ROOT).parts[0]
        found = [*missing_paths(text, ROOT), *missing_modules(text)]
        found += missing_scripts(text) if folder not in CITING else ()
        if found:
            missing[name(source)] = found
    assert not missing


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `kernels/gemv.py`, bundles/x and https://a.b/kernels/none.py", []),
        ("`kernels/gemv_none.py`", ["kernels/gemv_none.py"]),
        (
            "tests/helpers/<name>.py, benchmarks/PATH, benchmarks/results/*/none.json",
            ["benchmarks/results/*/none.json"],
        ),
        ("--output benchmarks/results/h100/none.json", []),
    ],
)
def test_what_is_taken_for_a_path(text: str, found: list[str]) -> None:
    assert list(missing_paths(text, ROOT)) == found


def test_what_is_taken_for_a_module() -> None:
    text = "jet_export.kernels.gemv, jet_export.runtime, jet_export.no_such, jet_export.kernels.gemv.none"
    assert list(missing_modules(text)) == ["jet_export.no_such", "jet_export.kernels.gemv.none"]
