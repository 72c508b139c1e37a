"""The tables of a run, in Markdown: of each piece that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from plan import Piece


def tables(found: Mapping[str, Any], progress: Mapping[str, Any], pieces: Sequence[Piece]) -> str:
    """`found`: results by piece."""
    writers: dict[str, Callable[[Any], Iterator[str]]] = {
        "placement": _placement, "truth": _truth, "compare": _compare, "block": _candidates, "design": _candidates,
        "shapes": _shapes, "models": _models, "engine": _engine,
    }  # fmt: skip
    lines = ["# PostNAS shown", "", *_pieces(progress, pieces)]
    for name, write in writers.items():
        if name in found:
            lines += ["", f"## {name}", "", *write(found[name])]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[_cell(x) for x in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *cells)]


def _cell(x: Any) -> str:
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


def _pieces(progress: Mapping[str, Any], pieces: Sequence[Piece]) -> Iterator[str]:
    def state(p: Piece) -> str:
        error = progress["errors"].get(p.name)
        return "done" if p.name in progress["done"] else f"failed: {error.splitlines()[0]}" if error else ""

    rows = [(p.name, p.what, round(p.seconds), round(progress["seconds"].get(p.name, 0)), state(p)) for p in pieces]
    yield from table(("piece", "", "assumed s", "took s", ""), rows)


def _scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Columns of a model's scores."""
    return {
        f"{task} {kind}": x for task, s in scores.items() for kind, x in s.items() if kind == "accuracy" or len(s) == 1
    }


def _placement(r: Mapping[str, Any]) -> Iterator[str]:
    yield f"Kept: layers {r['attention']}. {r['evaluated']} paths were scored. Values of paths, before any retrofit:"
    yield ""
    head = ("method", "k", "attention", "combined", *_scores(r["teacher"]))
    rows = [
        (p["method"], p["keep"], p["attention"], p["value"], *_scores(p["scores"]).values()) for p in r["placements"]
    ]
    yield from table(head, [*rows, ("teacher", r["layers"], "all", None, *_scores(r["teacher"]).values())])


def _truth(r: Mapping[str, Any]) -> Iterator[str]:
    yield "Placements of one layer, really retrofitted (Spearman, of the rankings with the retrofits'):"
    yield ""
    layers = range(len(next(iter(r.values()))["retrofits"]))
    head = ("task", "supernet", "restore-one KL", *(f"layer {i}" for i in layers))
    yield from table(head, [(task, *v["rank_correlation"].values(), *v["retrofits"]) for task, v in r.items()])


def _compare(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "After retrofits; mean and standard deviation over seeds; losses are negative, accuracies shares:"
    yield ""
    shown = [
        (r["method"], r["keep"], r["attention"], *(f"{t['mean']:.4f} ± {t['stdev']:.4f}" for t in r["tasks"].values()))
        for r in rows
    ]
    yield from table(("method", "k", "attention", *rows[0]["tasks"]), shown)


def _candidates(r: Mapping[str, Any]) -> Iterator[str]:
    rows = r["rows"]
    head = (
        "name",
        "mixer parameters",
        "state bytes",
        "tokens",
        "tokens/s",
        *rows[0]["training_loss"],
        *_scores(rows[0]["scores"]),
    )
    yield from table(
        head,
        [
            (
                row["name"], row["mixer_parameters"], row["state_bytes"], row["tokens"], round(row["tokens_per_s"]),
                *row["training_loss"].values(), *_scores(row["scores"]).values(),
            )
            for row in rows
        ],
    )  # fmt: skip


def _shapes(r: Mapping[str, Any]) -> Iterator[str]:
    yield f"Chosen: {r['chosen']} ({r['why']})."
    yield ""
    rows = [row for rung in r["rungs"] for row in rung]
    head = ("size", "rung", "value", "mixer parameters", *_scores(rows[0]["scores"]))
    shown = [(x["name"], x["rung"], x["value"], x["mixer_parameters"], *_scores(x["scores"]).values()) for x in rows]
    yield from table(head, shown)


def _models(r: Mapping[str, Any]) -> Iterator[str]:
    models = r["models"]
    head = ("model", "layers", "parameters", "bits per byte", *_scores(next(iter(models.values()))["scores"]))
    rows = [
        (n, m["layers"], m["parameters"], m["bits_per_byte"], *_scores(m["scores"]).values()) for n, m in models.items()
    ]
    yield from table(head, rows)


def _engine(r: Mapping[str, Any]) -> Iterator[str]:
    took = ", ".join(f"{name} {seconds} s" for name, seconds in r["seconds"].items())
    yield f"{r['precision']}: {took}. engine/*.log has what was printed, engine/bench.json the measurements."
