"""What a search prints: its plan before any work; the table of points and the summary after it."""

from __future__ import annotations

from rich.table import Table

from jet_export.bundle.memory import parameter_count
from jet_export.search.output import build_command, point_rows, synthetic_note
from jet_export.search.points import all_points, count_points, short_dtype
from jet_export.search.search import Search, shortened
from jet_export.utils.console import human

MAX_ROWS = 24  # of points, fast ones or refused ones


def plan_lines(search: Search) -> list[str]:
    """What the search is about to do."""
    spec = search.spec
    space, unmatched = spec.space, spec.unmatched_scores
    batch, context = spec.target
    grid = f"batch {', '.join(map(str, space.batch))} x context {', '.join(map(str, space.context))}"
    points = count_points(space, spec.preset)
    return [
        f"model      {spec.options.model}: {parameter_count(spec.preset) / 1e6:,.1f} M parameters",
        f"space      {spec.space_file}: {points:,} points, looked at by {spec.sampler}",
        *engine_lines(search),
        f"score      {spec.score.name} ({spec.score.source})",
        *([f"           keys that match no point: {shortened(unmatched)}"] if unmatched else []),
        f"device     {spec.setup.machine['device']}; backend {spec.backend.name} ({spec.backend.reason})",
        f"measured   {grid}, decode and prefill in chunks of {space.prefill_chunk}; target batch {batch}, "
        f"context {context}",
        f"database   {spec.database_file}",
        f"output     {spec.output}",
        *(f"refused    {e.label}: {e.refused}" for e in search.state.evaluations.values() if e.refused),
        *(cache_lines(search) if points else []),
    ]


def engine_lines(search: Search) -> list[str]:
    """How many engines the points of an enumerated space need."""
    if search.spec.sampler != "exact":
        return []
    points = [e for e in search.assess_all() if e.buildable]
    cells = {cell for e in points for cell in search.cells_of(e.point)}
    return [f"engines    {len(cells)} of layers for {len(points)} points, {search.spec.jobs} built at a time"]


def cache_lines(search: Search) -> list[str]:
    """The bound on cache bytes, where it is the preset's."""
    spec = search.spec
    bound = spec.constraints.allowed_cache_bytes(next(iter(all_points(spec.space, spec.preset))))
    if spec.space.cache_bytes != "preset" or bound is None:
        return []
    return [f"cache      at most the preset's at the same precision: {human(bound)} a sequence at first"]


def results_table(search: Search) -> Table:
    """Points by predicted throughput: the fastest, and all on the front."""
    rows = [r for r in point_rows(search) if r["refused"] is None]
    shown = [r for i, r in enumerate(rows) if i < MAX_ROWS or r["front"]]
    paper = any(r["paper_tokens_per_s"] for r in shown)
    scored = search.spec.score.name != "parameters"
    table = Table(box=None, header_style="bold")
    table.add_column("point")
    heads = ["parameters", "cache", "step ms", "tokens/s", "prefill tok/s", *(["score"] if scored else [])]
    heads += ["whole: tokens/s", "predicted", *(["paper tok/s"] if paper else [])]
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("")
    for r in shown:
        error = r["prediction_error"]
        cells = [r["point"], f"{r['parameters'] / 1e6:,.1f} M", human(r["cache_bytes"])]
        cells += [number(r["decode_ms"], "{:.4g}"), number(r["tokens_per_s"]), number(r["prefill_tokens_per_s"])]
        cells += [number(r["score"], "{:.4g}")] if scored else []
        cells += [number(r["whole_tokens_per_s"]), "–" if error is None else f"{100 * error:+.1f} %"]
        cells += [number(r["paper_tokens_per_s"])] if paper else []
        note = "chosen" if r["chosen"] else "front" if r["front"] else r["missed"] or ""
        table.add_row(*cells, note)
    return table


def number(x: float | None, form: str = "{:,.0f}") -> str:
    return "–" if x is None else form.format(x)


def summary_lines(search: Search) -> list[str]:
    """Printed below the table."""
    spec, state, best = search.spec, search.state, search.chosen
    assert best is not None
    batch, context = spec.target
    refused = [f"refused: {e.label}: {e.refused}" for e in state.evaluations.values() if e.refused]
    precision = f"state {short_dtype(best.point.state_dtype)}" + (", FP8 weights" if best.point.fp8 else "")
    return [
        f"decode and prefill at batch {batch}, context {context}; a point's figures are the sums of its layers'; "
        "predicted: their error against the engine built whole",
        *refused[:MAX_ROWS],
        *([f"refused: {len(refused) - MAX_ROWS} more, in points.csv"] if len(refused) > MAX_ROWS else []),
        *(f"failed: {reason}" for reason in state.failed.values()),
        *noise_lines(search),
        *(["out of time: not all points are measured; --resume goes on"] if state.timed_out else []),
        f"choice: {best.label} ({precision}): {state.reason}",
        f"report: {spec.output / 'report.html'}",
        f"Next: {build_command(search, best)}",
    ]


def noise_lines(search: Search) -> list[str]:
    """What makes some of the measurements doubtful."""
    state, note = search.state, synthetic_note(search)
    noise = (
        f"noise: {state.noisy} of {state.repeated} measurements are over 10 % quicker than the next of their repeats; "
        "is the machine in use? --resume --remeasure measures them again"
    )
    left_out = [f"left out: {why} --resume --remeasure measures it again" for why in state.inconsistent.values()]
    return [*([noise] if state.noisy else []), *left_out, *([note] if note else [])]
