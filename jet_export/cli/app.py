"""The `jet-export` command: its subcommands, and its exit status on errors."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from jet_export.cli import (
    bench,
    build,
    evaluate,
    export_hf,
    generate,
    inspect,
    postnas,
    retrofit,
    search,
    serve,
    sign,
    simulate,
    try_model,
    verify,
)
from jet_export.utils.errors import (
    BAD_INPUT,
    DISK,
    GPU_MEMORY,
    IO_FAILED,
    JetExportError,
    JetExportWarning,
    io_failure,
    out_of_gpu_memory,
)

PYTHONS_SHOWWARNING = warnings.showwarning

app = typer.Typer(
    name="jet-export",
    help="Build, verify and run inference engines for Jet-Nemotron models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(wanted: bool) -> None:
    """Callback of --version."""
    if not wanted:
        return
    from jet_export.utils.environment import version_lines

    for line in version_lines():
        typer.echo(line)
    raise typer.Exit


@app.callback()
def jet_export(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Versions, CUDA and the GPU; then stop."),
    ] = False,
) -> None:
    pass


app.command(epilog="Example: jet-export build --model jet-4b --fp8")(build.build)
app.command(epilog='Example: jet-export generate bundles/jet-tiny-fp8-inductor --prompt "def "')(generate.generate)
app.command(epilog="Example: jet-export verify bundles/jet-tiny-fp8-inductor --json verify.json")(verify.verify)
app.command(epilog="Example: jet-export bench bundles/jet-2b-fp8-inductor --protocol paper --baseline qwen3-1.7b")(
    bench.bench
)
app.command(
    "eval", epilog="Example: jet-export eval bundles/jet-2b-fp8-inductor --tasks needle,bits_per_byte --limit 50"
)(evaluate.evaluate)
app.command(epilog="Example: jet-export inspect --model jet-4b --batch 64 --context 65536")(inspect.inspect)
app.command(epilog="Example: jet-export serve bundles/jet-tiny-fp8-inductor --openai --port 8000")(serve.serve)
app.command(epilog="Example: jet-export sign bundles/jet-2b-fp8-inductor --key key.pem")(sign.sign)
app.command("export-hf", epilog="Example: jet-export export-hf --model jet-4b --fp8 --output jet-4b-fp8")(
    export_hf.export_hf
)
app.command("try", epilog="Example: jet-export try jet-2b --trust-remote-code")(try_model.try_model)
app.command(epilog="Example: jet-export search --model jet-2b --output searches/jet-2b")(search.search)
app.command(
    epilog="Example: jet-export simulate --model jet-2b --fp8 --rate 40 --replicas auto --slo ttft=500ms,tpot=30ms"
)(simulate.simulate)
app.command(epilog="Example: jet-export retrofit --recipe recipe.toml --teacher Qwen2.5-1.5B --output runs/jet-2b")(
    retrofit.retrofit
)
app.command(epilog="Example: jet-export postnas examples/postnas/toy.toml --output runs/toy")(postnas.postnas)


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
    """Our own warnings in one line, without the line of code that Python prints; others as ever."""
    if issubclass(category, JetExportWarning):
        typer.echo(f"warning: {message}", err=True)
    else:
        PYTHONS_SHOWWARNING(message, category, *where, **rest)


def main() -> None:
    """Console entry point. Bad input: one message on standard error, exit status 2."""
    warnings.showwarning = show_warning
    try:
        app()
    except JetExportError as e:
        typer.echo(f"error: {e}", err=True)
        sys.exit(e.status)
    except Exception as e:
        if said := out_of_gpu_memory(f"{type(e).__name__}: {e}"):
            typer.echo(f"error: {said}\n{GPU_MEMORY}", err=True)
            sys.exit(BAD_INPUT)
        if said := io_failure(e):
            typer.echo(f"error: {said}\n{DISK}", err=True)
            sys.exit(IO_FAILED)
        raise
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
