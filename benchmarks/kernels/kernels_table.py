"""One table of kernels: rows of kernels.py and kernels_attention.py in one form, printed and drawn.

python benchmarks/kernels/kernels_table.py RESULTS.json      # print and draw a result again
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "jet"  # variants of this project begin with it


@dataclass(frozen=True)
class KernelRow:
    """One variant of one case. `roofline` names what `share` is a share of: "copy" or "matmul"."""

    kernel: str
    model: str
    shape: str
    dtypes: str
    variant: str
    ms: float
    p90: float
    gb_s: float | None  # of the bytes that must be moved
    tflop_s: float | None
    roofline: str
    share: float | None  # None: of other work than ours, not comparable with this roofline
    note: str = ""


def row(
    kernel: str, model: str, shape: str, dtypes: str, variant: str, timing: Any, nbytes: float, flops: float,
    copy: float, matmul: float, note: str = "", same_work: bool = True,
) -> KernelRow:  # fmt: skip
    """timing: of one call, ms. The roofline is the slower of moving `nbytes` and computing `flops`."""
    seconds = timing.median * 1e-3
    memory, compute = nbytes / copy, flops / matmul
    return KernelRow(
        kernel,
        model,
        shape,
        dtypes,
        variant,
        timing.median,
        timing.p90,
        nbytes / seconds / 1e9 if same_work else None,
        flops / seconds / 1e12 if flops and same_work else None,
        "copy" if memory >= compute else "matmul",
        max(memory, compute) / seconds if same_work else None,
        note,
    )


def table(rows: list[KernelRow]) -> Table:
    out = Table(box=None, header_style="bold")
    for name in ("kernel", "model", "shape", "dtypes", "variant"):
        out.add_column(name, no_wrap=True)
    for name in ("median ms", "p90", "GB/s", "TFLOP/s", "of roofline", "vs ours"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("")
    ours = {(r.kernel, r.model, r.shape, r.dtypes): r.ms for r in rows if r.variant.startswith(OURS)}
    for r in rows:
        own = ours.get((r.kernel, r.model, r.shape, r.dtypes))
        out.add_row(
            r.kernel,
            r.model,
            r.shape,
            r.dtypes,
            r.variant,
            f"{r.ms:.4g}",
            f"{r.p90:.4g}",
            number(r.gb_s),
            number(r.tflop_s),
            f"{r.share:.0%} {r.roofline}" if r.share is not None else "–",
            f"{r.ms / own:.2f}x" if own and not r.variant.startswith(OURS) else "",
            r.note,
        )
    return out


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:,.0f}"


def show(rows: list[KernelRow]) -> None:
    Console(width=190, highlight=False).print(table(rows))


def draw(path: Path, rows: list[KernelRow], environment: dict[str, str]) -> None:
    """Time of each case relative to ours, a bar a variant; ours with its share of the roofline written on it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r.kernel, r.model, r.shape, r.dtypes) for r in rows))
    figure, axis = plt.subplots(figsize=(11, 1 + 0.45 * len(cases)))
    variants = list(dict.fromkeys(r.variant for r in rows))
    colours = dict(zip(variants, map(plt.colormaps["tab10"], range(10)), strict=False))
    shown: set[str] = set()
    for y, case in enumerate(cases):
        mine = [r for r in rows if (r.kernel, r.model, r.shape, r.dtypes) == case]
        own = next((r.ms for r in mine if r.variant.startswith(OURS)), mine[0].ms)
        height = 0.8 / len(mine)
        for i, r in enumerate(mine):
            label = None if r.variant in shown else r.variant
            shown.add(r.variant)
            place = y - 0.4 + (i + 0.5) * height
            axis.barh(place, r.ms / own, height, color=colours.get(r.variant), label=label)
            text = f"{r.ms:.3g} ms" + (f", {r.share:.0%} of {r.roofline}" if r.share is not None else "")
            axis.text(r.ms / own, place, f" {text}", va="center", fontsize=6)
    axis.set_yticks(range(len(cases)), [" ".join(c) for c in cases], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("time, ours = 1")
    if axis.get_xlim()[1] > 20:
        axis.set_xscale("log")
    axis.legend(fontsize=7)
    e = environment
    axis.set_title(
        f"{e['gpu']}, torch {e['torch']}, Triton {e['triton']}, {e['date']}, commit {e['commit']}", fontsize=8
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def read(path: Path) -> tuple[list[KernelRow], dict[str, str]]:
    values = json.loads(path.read_text(encoding="utf-8"))
    return [KernelRow(**r) for r in values["rows"]], values["environment"]


def to_dicts(rows: list[KernelRow]) -> list[dict[str, Any]]:
    return [asdict(r) for r in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    file = parser.parse_args().results
    found, where = read(file)
    show(found)
    draw(file.with_suffix(".png"), found, where)
