"""mkdocs hook: what pages name outside docs/, relative to themselves, as GitHub shows it.

Pictures of benchmarks/results become files of the site; of a link to another file of the repository the text stays.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(?<!!)\[([^\]\n]+)\]\(((?:\.\./)+[\w./*-]+)(?:#[\w-]+)?\)")
PICTURE = re.compile(r"\]\(((?:\.\./)+benchmarks/results/[\w./-]+\.png)\)")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    wanted = {name for page in files.documentation_pages() for name in pictures(Path(page.abs_src_path))}
    for name in sorted(wanted):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    folder = Path(page.file.abs_src_path).parent

    def unlinked(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / found[2]))
        return found[0] if target.is_relative_to(config.docs_dir) else found[1]

    depth = len(PurePosixPath(page.file.src_uri).parts) - 1
    markdown = PICTURE.sub(lambda found: f"]({'../' * depth}{inside(found[1])})", markdown)
    return OUTSIDE.sub(unlinked, markdown)


def pictures(document: Path) -> list[str]:
    """The pictures of a document, relative to the repository."""
    return [inside(found[1]) for found in PICTURE.finditer(document.read_text(encoding="utf-8"))]


def inside(path: str) -> str:
    return os.path.normpath(path).lstrip("./")
