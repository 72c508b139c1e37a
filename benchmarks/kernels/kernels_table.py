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


def measured_peaks(result: dict[str, Any]) -> tuple[float, float]:
    """Bytes a second of a copy and FLOPs a second of a bf16 product on this GPU; printed, and put into `result`."""
    import torch

    from jet_export.bench import timer

    copy, matmul = timer.copy_speed(), timer.matmul_speed(torch.bfloat16)
    result |= {"copy_bytes_per_s": copy, "matmul_flop_per_s": matmul}
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 product {matmul / 1e12:.0f} TFLOP/s", flush=True)
    return copy, matmul


def report(output: Path, rows: list[KernelRow]) -> None:
    """The table, and beside a result's file its picture."""
    from jet_export.utils.environment import environment

    show(rows)
    try:
        draw(output.with_suffix(".png"), rows, environment())
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'jet-export[bench]')")


def draw(path: Path, rows: list[KernelRow], environment: dict[str, str]) -> list[Path]:
    """One picture an op, `path`'s name with the op's behind it: the time of each case relative to ours, a bar a
    variant, with its share of the roofline; models side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = list(dict.fromkeys(r.variant for r in rows))
    colours = dict(zip(variants, map(plt.colormaps["tab10"], range(10)), strict=False))
    e, written = environment, []
    where = f"{e['gpu']}, torch {e['torch']}, Triton {e['triton']}, {e['date']}, commit {e['commit']}"
    for op in dict.fromkeys(r.kernel for r in rows):
        of = [r for r in rows if r.kernel == op]
        models = list(dict.fromkeys(r.model for r in of))
        most = max(len({(r.shape, r.dtypes) for r in of if r.model == model}) for model in models)
        size = (7.5 * len(models), 1.5 + 0.45 * most)
        figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained")
        for axis, model in zip(axes[0], models, strict=True):
            bars(axis, [r for r in of if r.model == model], colours)
            axis.set_title(model)
        shown = [v for v in variants if any(r.variant == v for r in of)]
        handles = [plt.Rectangle((0, 0), 1, 1, color=colours[v]) for v in shown]
        figure.legend(handles, shown, loc="outside upper right", ncols=len(shown), fontsize=9)
        figure.suptitle(f"{op}: {where}", fontsize=9, x=0.01, ha="left")
        written.append(path.with_name(f"{path.stem}-{op.replace(' ', '-')}.png"))
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


def bars(axis: Any, rows: list[KernelRow], colours: dict[str, Any]) -> None:
    cases = list(dict.fromkeys((r.shape, r.dtypes) for r in rows))
    for y, case in enumerate(cases):
        mine = [r for r in rows if (r.shape, r.dtypes) == case]
        own = next((r.ms for r in mine if r.variant.startswith(OURS)), mine[0].ms)
        height = 0.8 / len(mine)
        for i, r in enumerate(mine):
            place = y - 0.4 + (i + 0.5) * height
            axis.barh(place, r.ms / own, height, color=colours.get(r.variant))
            text = f"{r.ms:.3g} ms" + (f", {r.share:.0%} of {r.roofline}" if r.share is not None else "")
            axis.text(r.ms / own, place, f" {text}", va="center", fontsize=8)
    axis.set_yticks(range(len(cases)), [f"{shape}\n{dtypes}" for shape, dtypes in cases], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time, ours = 1")
    if axis.get_xlim()[1] > 20:
        axis.set_xscale("log")
    axis.set_xlim(right=axis.get_xlim()[1] * 1.3)
    axis.spines[["top", "right"]].set_visible(False)


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
