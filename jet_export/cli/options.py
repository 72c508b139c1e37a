"""What the commands share: types of options, and how their values are read."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from jet_export.utils.errors import JetExportError

Model = Annotated[str, typer.Option(help="jet-tiny, jet-2b, jet-4b, a checkpoint directory, config.json or a hub id.")]
Bundle = Annotated[Path, typer.Argument(help="A directory made by `jet-export build`.", show_default=False)]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Batch invariance: a prompt gives the same bits whatever else runs; slower."),
]

Speculate = Annotated[
    str,
    typer.Option(
        help="Draft tokens that a step verifies: lookup (n-grams of the request itself), mtp (build --mtp) or off."
    ),
]
Draft = Annotated[Path | None, typer.Option(help="A bundle that drafts tokens instead, of the same tokenizer.")]
Drafts = Annotated[
    int | None, typer.Option(help="Tokens of a draft, at most; default: what the bundle was built for (--speculate).")
]


def configure_trust(key: Path | None) -> Path | None:
    """Callback of --trusted-key."""
    if key is not None:
        from jet_export.bundle.signature import trust

        trust(key)
    return key


TrustedKey = Annotated[
    Path | None,
    typer.Option(
        envvar="JET_TRUSTED_KEY",
        callback=configure_trust,
        help="Public key (PEM): load only bundles that it has signed (jet-export sign).",
    ),
]


def command_line() -> list[str]:
    """This process's command, quoted for a shell, as bundles and results record it."""
    return ["jet-export", *(shlex.quote(a) for a in sys.argv[1:])]


def parse_bytes(text: str, option: str) -> int:
    """512M, 4G, or a number of bytes; K, M, G are powers of 1024. Raises JetExportError."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    unit = units.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isascii() or not digits.isdigit():
        raise JetExportError(f"{option} {text}: not a size.", "Give bytes, or a number with K, M or G, e.g. 512M.")
    return int(digits) * unit
