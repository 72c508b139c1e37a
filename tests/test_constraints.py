"""constraints.txt pins, with hashes, what pyproject.toml asks for in development."""

import re
import tomllib

from helpers.paths import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_OUT = {"torch"}  # which build is the user's choice
TESTED = {"python_version": "3.11", "python_full_version": "3.11.7", "platform_machine": "x86_64", "extra": "dev"}


def test_the_tested_set_is_what_pyproject_asks_for() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    wrong = [
        f"{r}: {pinned.get(canonicalize_name(r.name), 'absent')}"
        for r in asked
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate(TESTED))
        if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"), prereleases=True)
    ]
    assert not wrong, "run make constraints"
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert entries and all("--hash=sha256:" in entry for entry in entries)
