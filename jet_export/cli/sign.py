"""`jet-export sign`: a signature over a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jet_export.cli.options import Bundle


def sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option(help="Private elliptic-curve key in PEM.", show_default=False)],
    password: Annotated[
        str | None, typer.Option(envvar="JET_KEY_PASSWORD", help="Of an encrypted key; prefer the variable.")
    ] = None,
) -> None:
    """Sign a bundle, for those who load it with --trusted-key."""
    from jet_export.bundle.signature import sign_bundle

    typer.echo(f"wrote {sign_bundle(bundle, key, password)}")
