"""Draw the pictures of benchmarks/results again, from the files beside them.

    python benchmarks/tools/pictures.py [FOLDER]      # by default all of benchmarks/results

bench.json: bench.png; kernels.json: one picture an op; sglang-*.json: beside-sglang.png, with our own of the
same GPU; a search's results.json: front.png, and report.html with --pages
(5 MB each, with plotly.js inside).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "kernels"))

import kernels_table  # noqa: E402

from jet_export.bench import picture  # noqa: E402
from jet_export.bench.rows import Row  # noqa: E402
from jet_export.search.report import report, with_paper  # noqa: E402


def draw_bench(file: Path) -> Iterator[Path]:
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = [Row(**row) for bundle in result["bundles"] for row in bundle["rows"]]
    if rows:
        yield (out := file.with_name("bench.png"))
        picture.draw(out, rows, result["environment"])


def draw_kernels(file: Path) -> Iterator[Path]:
    yield from kernels_table.draw(file.with_suffix(".png"), *kernels_table.read(file))


def draw_front(file: Path) -> Iterator[Path]:
    """Throughput against parameters of a search's points."""
    results = json.loads(file.read_text(encoding="utf-8"))
    points = [r for r in with_paper(results["points"]) if r["tokens_per_s"]]
    front = sorted((r for r in points if r["front"]), key=lambda r: r["tokens_per_s"])
    whole = [r for r in points if r["whole_tokens_per_s"]]
    plt = picture.pyplot()
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    chosen = [r for r in points if r["chosen"]]
    for label, rows, key, marks in (
        ("sum of layers", points, "tokens_per_s", {"marker": "o", "linestyle": "none", "color": "grey"}),
        ("front", front, "tokens_per_s", {"marker": "o", "color": "tab:blue"}),
        ("built whole", whole, "whole_tokens_per_s", {"marker": "D", "fillstyle": "none", "linestyle": "none"}),
        ("chosen", chosen, "tokens_per_s", {"marker": "*", "markersize": 14, "linestyle": "none", "color": "tab:red"}),
    ):
        axis.plot([r[key] for r in rows], [r["parameters"] / 1e6 for r in rows], label=label, **marks)
    for r in points:
        mark, place = (r["tokens_per_s"], r["parameters"] / 1e6), (7, 6) if r["front"] else (-7, -11)
        side = "left" if r["front"] else "right"
        axis.annotate(r["point"], mark, xytext=place, textcoords="offset points", fontsize=8, ha=side)
    axis.margins(x=0.12)
    axis.set_xlabel("tokens/s, whole batch")
    axis.set_ylabel("parameters, millions")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    target, e = results["target"], results["environment"]
    at = f"batch {target['batch']}, context {target['context']}"
    axis.set_title(f"{results['machine']['device']}, {at}, {e['date']}, commit {e['commit']}", fontsize=9)
    yield (out := file.with_name("front.png"))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_beside(file: Path) -> Iterator[Path]:
    """Our bench and workload on the same GPU, commits in the title, beside another server's figures."""
    peer = json.loads(file.read_text(encoding="utf-8"))
    ours = json.loads((file.parent / "bench-latency-jet-2b-bf16" / "bench.json").read_text(encoding="utf-8"))
    served = json.loads((file.parent / "workload-jet-2b-bf16-kinds.json").read_text(encoding="utf-8"))
    rows = {(r["batch"], r["context"]): r for r in ours["bundles"][0]["rows"]}
    theirs = {(r["model"], r["point"]): r for r in peer["rows"]}
    groups = [("256 chats, 64 at once", [served["rows"][0]["tokens_per_s"]], "")]
    for label, at, point in (
        ("decode B1, 1K", (1, 1024), "d:1x1024"),
        ("decode B64, 1K", (64, 1024), "d:64x1024"),
        ("decode B64, 4K", (64, 4096), "d:64x4096"),
        ("prefill 16 x 2048", (16, 2048), "p:16x2048"),
    ):
        key = "prefill_tokens_per_s" if point.startswith("p") else "decode_tokens_per_s"
        groups.append((label, [rows[at][key]], point))
    for _, values, point in groups:
        for model in ("jet-2b", "qwen3-1.7b"):
            found = theirs.get((model, point), {})
            value = found.get("prefill_tok_s") or found.get("decode_tok_s_diff") or peer["workload"][model]["greedy"]
            values.append(value)
    plt = picture.pyplot()
    figure, axis = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    names = ("jet-export, jet-2b", "SGLang 0.5.17, jet-2b", "SGLang 0.5.17, Qwen3-1.7B-shaped")
    for i, (name, color) in enumerate(zip(names, ("tab:blue", "tab:orange", "silver"), strict=True)):
        heights = [values[i] / values[1] for _, values, _ in groups]
        places = [g + 0.27 * (i - 1) for g in range(len(groups))]
        bars = axis.bar(places, heights, 0.25, label=name, color=color)
        axis.bar_label(bars, [f"{values[i]:,.0f}" for _, values, _ in groups], fontsize=7, padding=2)
    axis.set_xticks(range(len(groups)), [label for label, _, _ in groups], fontsize=8)
    axis.set_ylabel("tokens/s, SGLang's jet-2b = 1 (figures: tokens/s)", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    e = ours["environment"]
    when = f"jet-export {e['commit']}, {e['date']}; SGLang {peer['environment']['date']}"
    axis.set_title(f"One {e['gpu']}, bf16, random weights; {when}", fontsize=9)
    yield (out := file.with_name("beside-sglang.png"))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def write_page(file: Path) -> Iterator[Path]:
    yield (out := file.with_name("report.html"))
    out.write_text(report(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


def pictures(folder: Path, pages: bool) -> Iterator[Path]:
    """Of all results below, as they are drawn."""
    for file in sorted(folder.rglob("*.json")):
        if file.name == "bench.json":
            yield from draw_bench(file)
        elif file.name == "kernels.json":
            yield from draw_kernels(file)
        elif file.name.startswith("sglang-"):
            yield from draw_beside(file)
        elif file.name == "results.json":
            yield from draw_front(file)
            yield from write_page(file) if pages else ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "benchmarks" / "results")
    parser.add_argument("--pages", action="store_true", help="report.html of searches too")
    options = parser.parse_args()
    for path in pictures(options.folder, options.pages):
        print(path)


if __name__ == "__main__":
    main()
