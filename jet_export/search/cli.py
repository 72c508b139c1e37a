"""`jet-export search`: the plan, the search, what came of it."""

from __future__ import annotations

from collections.abc import Callable

from jet_export.report import console
from jet_export.search.output import results_table, summary_lines, write_results
from jet_export.search.run import SearchOptions, build_engines, plan_lines, prepare, run_search


def run_command(options: SearchOptions, dry_run: bool, emit: Callable[[str], None]) -> None:
    """Raises JetExportError for bad input, and where no point is left to choose."""
    search = prepare(options)
    for line in plan_lines(search):
        emit(line)
    if dry_run:
        return
    if options.build_only:
        build_engines(search, emit)
        return
    run_search(search, emit)
    write_results(search)
    out = console()
    out.width = max(out.width, 140)
    out.print(results_table(search))
    for line in summary_lines(search):
        emit(line)
