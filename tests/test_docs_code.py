"""The Python of README.md and of the first pages of the documentation runs as it stands, on the tests' bundle; the
jet-export commands there are ones that the command line takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from helpers.bundles import tiny_bundle
from helpers.paths import ROOT

from jet_export.cli.app import app

PAGES = [
    "README.md",
    "docs/quickstart.md",
    "docs/python.md",
    "docs/serving/how-it-runs.md",
    "docs/serving/sessions-and-caches.md",
]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [(page, i, code) for page in PAGES for i, code in enumerate(PYTHON.findall((ROOT / page).read_text("utf-8")))]
GIVEN = {"input_ids": lambda: torch.tensor([[1, 2, 3], [4, 5, 6]])}  # names that a block takes for given


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory)


@pytest.mark.parametrize(("page", "i", "code"), BLOCKS, ids=[f"{page}-{i}" for page, i, _ in BLOCKS])
def test_python(page: str, i: int, code: str, bundle: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles/jet-tiny-fp8-inductor").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__", **{name: make() for name, make in GIVEN.items() if name in code}}
    exec(compile(code, f"{page}, block {i}", "exec"), names)


def commands(page: Path) -> list[list[str]]:
    """The words of each jet-export command of a page's plain blocks; lines that end in a backslash are joined."""
    found = []
    for block in FENCED.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").split("  #")[0].strip()
            if line.startswith("jet-export "):
                found.append(shlex.split(line)[1:])
    return found


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        if words[0].startswith("-"):
            continue
        assert words[0] in group.commands, f"{page}: jet-export {words[0]}"
        options = {o for p in group.commands[words[0]].params for o in (*p.opts, *p.secondary_opts)}
        asked = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert asked <= options, f"{page}: jet-export {shlex.join(words)}"


def test_the_pages_have_code() -> None:
    assert len(BLOCKS) >= 6
    assert sum(len(commands(page)) for page in DOCUMENTS) >= 40
