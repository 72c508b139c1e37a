"""`jet-export search`: prints the plan, runs the search, writes and prints the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jet_export.cli.options import Model

if TYPE_CHECKING:
    from jet_export.search.spec import SearchOptions


def search(
    model: Model = "jet-2b",
    backend: Annotated[str, typer.Option(help="Of the engines that are measured: auto or inductor.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Model dtype: bfloat16 or float32.")] = "bfloat16",
    space: Annotated[Path | None, typer.Option(help="TOML: docs/guides/search.md; default: the paper's.")] = None,
    scores: Annotated[str, typer.Option(help="parameters, paper, a file, or FILE.py:FUNCTION.")] = "parameters",
    sampler: Annotated[str, typer.Option(help="auto, exact, grid, tpe or nsga2.")] = "auto",
    trials: Annotated[int | None, typer.Option(help="Points that Optuna looks at; default 200.")] = None,
    whole: Annotated[int, typer.Option(help="Points on the front that are built whole and measured.")] = 3,
    jobs: Annotated[int | None, typer.Option(help="Engines built at a time; default half the cores, up to 4.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which no further engine is built.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Default: searches/<model>-<backend>.")] = None,
    database: Annotated[Path | None, typer.Option(help="Measurements; default: measurements.db beside it.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna's study in a database that several searches share: postgresql://...; default: a file."
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Build and measure on this Ray cluster's nodes: auto, HOST:PORT.")
    ] = None,
    measure_on: Annotated[
        str | None, typer.Option(help="With --ray: on GPUs of this kind (H100), or nodes with this resource.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --output.")] = False,
    keep_engines: Annotated[bool, typer.Option("--keep-engines", help="Leave the bundles on disk.")] = False,
    build_only: Annotated[bool, typer.Option("--build-only", help="Build, for a later call to measure.")] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure again what repeats do not confirm.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the points and engines, and stop.")] = False,
) -> None:
    """Choose head sizes, precisions and layouts by the latency of engines measured here."""
    from jet_export.search.spec import SearchOptions

    options = SearchOptions(
        model=model,
        backend=backend,
        device=device,
        dtype=dtype,
        space=space,
        scores=scores,
        sampler=sampler,
        trials=trials,
        whole=whole,
        jobs=jobs,
        timeout=timeout,
        seed=seed,
        output=output,
        database=database,
        resume=resume,
        keep_engines=keep_engines,
        build_only=build_only,
        remeasure=remeasure,
        storage=storage,
        ray=ray,
        measure_on=measure_on,
    )
    run_search_command(options, dry_run, typer.echo)


def run_search_command(options: SearchOptions, dry_run: bool, emit: Callable[[str], None]) -> None:
    """Raises JetExportError for bad input, and where no point is left to choose."""
    from dataclasses import replace

    from jet_export.search.output import write_results
    from jet_export.search.run import build_engines, run_search
    from jet_export.search.search import Search
    from jet_export.search.spec import SearchSpec
    from jet_export.search.terminal import plan_lines, results_table, summary_lines
    from jet_export.utils.console import console
    from jet_export.utils.errors import JetExportError

    cluster = None
    if options.measure_on and not options.ray:
        raise JetExportError("--measure-on belongs to --ray.")
    if options.ray:
        from jet_export.search.ray_cluster import RayCluster

        cluster = RayCluster.connect(options.ray, options.device, options.measure_on, emit)
        options = replace(options, jobs=options.jobs or cluster.slots()[0])
    search = Search(SearchSpec.from_options(options, cluster.host() if cluster else None))
    for line in plan_lines(search):
        emit(line)
    if dry_run:
        return
    if options.build_only:
        build_engines(search, emit, cluster=cluster)
        return
    run_search(search, emit, cluster=cluster)
    write_results(search)
    out = console()
    out.width = max(out.width, 140)
    out.print(results_table(search))
    for line in summary_lines(search):
        emit(line)
