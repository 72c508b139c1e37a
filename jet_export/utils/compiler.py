"""The C++ compiler: $CXX, which may be several words ("ccache g++"), or g++ where it is unset or empty."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from jet_export.utils.errors import JetExportError


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C++17: the path of an executable, and the arguments that follow it."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)

    def version(self) -> str:
        """The output of `--version`."""
        return subprocess.run([*self.words, "--version"], capture_output=True, text=True).stdout

    @contextmanager
    def executable(self) -> Iterator[str]:
        """The path of one file that runs the whole command, for programs that take $CXX for a file's name."""
        if len(self.words) == 1:
            yield self.words[0]
            return
        with TemporaryDirectory(prefix="jet-export-cxx-") as folder:
            # Callers recognise a compiler by its name.
            script = Path(folder) / ("clang++" if any("clang" in word for word in self.words) else "g++")
            script.write_text(f'#!/bin/sh\nexec {self} "$@"\n')
            script.chmod(0o755)
            yield str(script)


def compiler_words() -> list[str]:
    """$CXX split into words; g++ where it is unset or empty. Raises JetExportError for an unbalanced quote."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text) or ["g++"]
    except ValueError as e:
        raise JetExportError(f"CXX={text}: {e}.", "Name a C++ compiler, e.g. export CXX=/usr/bin/g++.") from None


def find_compiler(needed_by: str) -> Compiler:
    """The C++17 compiler. Raises JetExportError, which names `needed_by`, where there is none or it is too old."""
    name, *rest = compiler_words()
    path = shutil.which(name)
    if path is None:
        raise JetExportError(
            f"no C++ compiler: {name} is not on the PATH, and {needed_by} is compiled with it.",
            "Install g++ (Debian, Ubuntu: apt-get install g++), or set CXX to a C++17 compiler.",
        )
    compiler = Compiler((path, *rest))
    command = [*compiler.words, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    probe = subprocess.run(command, input="inline int one = 1; int main() {}\n", capture_output=True, text=True)
    if probe.returncode:
        why = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[0]
        raise JetExportError(
            f"{compiler} does not compile C++17: {why}", "Install g++ 7 or newer, or set CXX to a C++17 compiler."
        )
    return compiler
