"""The command line's reference page, written from the commands themselves.

python -m jet_export.cli.reference > docs/cli.md
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

HEAD = """# Command line

Written by `python -m jet_export.cli.reference > docs/cli.md` from the commands' own help.

Bad input gets one message (what, where, what to do) on standard error, leaves nothing half-written, and exits with 2.
"""


def reference(app: typer.Typer) -> str:
    """The page: a section a command, a table of its options. Markdown."""
    group: Any = typer.main.get_command(app)  # click's, which typer carries a copy of: its classes have no public name
    return "\n".join([HEAD, *(line for name in group.commands for line in section(name, group.commands[name]))])


def section(name: str, command: Any) -> Iterator[str]:
    """One command's lines."""
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in shown if is_argument(p)]
    yield f"## jet-export {name}\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    yield "```\n" + " ".join(["jet-export", name, *arguments, "[OPTIONS]"]) + "\n```\n"
    if shown:
        yield "| | | default |\n|---|---|---|"
        yield from map(row, shown)
        yield ""
    if command.epilog:
        yield f"Example: `{command.epilog.removeprefix('Example: ')}`\n"


def is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def row(parameter: Any) -> str:
    """One option or argument."""
    names = [parameter.name.upper()] if is_argument(parameter) else [*parameter.opts, *parameter.secondary_opts]
    default = parameter.default
    if default is True:
        default = names[0]
    plain = isinstance(default, (int, float, str)) and default is not False and default != ""
    shown = f"`{default}`" if plain else "required" if parameter.required else ""
    text = " ".join((parameter.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
    return f"| {', '.join(f'`{name}`' for name in names)} | {text} | {shown} |"


if __name__ == "__main__":
    from jet_export.cli.app import app

    print(reference(app), end="")
