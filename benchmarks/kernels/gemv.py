"""Linear layers of one token: jet::gemv in every tile size beside the library's product, jet-2b's sizes, one GPU.

    python benchmarks/kernels/gemv.py [--tiles all] [--output FILE]

Times are a call's in a CUDA graph over copies of the weights that do not fit L2, launch gaps included. The roofline is
reading W once at copy speed. --tiles table (the default): the configuration in use; all: every candidate, for
kernels/configs.json. The library's FP8 product is also timed with 16, 64 and 128 rows.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arguments import lacks_gpu, output_of, parser_of
from candidates import CANDIDATES, GEMV_SIZES
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jet_export.bench import timer
from jet_export.kernels import configs
from jet_export.kernels.gemv import gemv_ref
from jet_export.utils.environment import write_result

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
COPIES = 2.4e8  # bytes of weights that a graph walks through
BOUND = 5e-3  # of bf16 results


def library(x: Tensor, w: Tensor, one: Tensor) -> Tensor:
    if w.dtype == FP8:
        return torch._scaled_mm(x, w.t(), one, one, out_dtype=BF16, use_fast_accum=False)
    return torch.nn.functional.linear(x, w)


def gemv(x: Tensor, scales: tuple[Tensor | None, Tensor | None], w: Tensor) -> Tensor:
    y: Tensor = torch.ops.jet.gemv(x, w, *scales, *[None] * 4, 0.0, False, False, BF16, [])
    return y


def measure(name: str, dtype: torch.dtype, tiles: list[dict[str, int]], copy: float) -> dict[str, Any]:
    """Microseconds of every variant of one layer; a wrong one raises."""
    N, K = GEMV_SIZES[name]
    nbytes = N * K * dtype.itemsize
    copies = max(2, min(40, int(COPIES / nbytes)))
    weights = [torch.randn(N, K, device="cuda", dtype=BF16).to(dtype) for _ in range(copies)]
    x, one = torch.randn(1, K, device="cuda", dtype=BF16).to(dtype), torch.ones(1, device="cuda")
    want = gemv_ref(x, weights[0], None, None, None, None, None, None, 0.0, False, False, torch.float32)
    variants: dict[str, Callable[[], Any]] = {}

    def add(label: str, call: Callable[[Tensor], Tensor]) -> None:
        error = float((call(weights[0])[:1].float() - want).norm() / want.norm())
        if not error <= BOUND:
            raise ValueError(f"{name} {label}: error {error:.1e}")
        variants[label] = timer.capture(lambda: [call(w) for w in weights])

    add("library", lambda w: library(x, w, one))
    for rows in (16, 64, 128) if dtype == FP8 else ():
        many = x.float().repeat(rows, 1).to(dtype)
        add(f"library, {rows} rows", partial(library, many, one=one))
    for use in tiles or [configs.lookup("gemv", dtype=dtype, out_features=N, in_features=K, normed=False, gated=False)]:
        if use["BK"] < 2 * K:
            with configs.override("gemv", use):
                label = "gemv " + " ".join(f"{k}={v}" for k, v in use.items())
                scales = (one, one) if dtype == FP8 else (None, None)
                add(label, partial(gemv, x, scales))
    times = timer.compare(variants, repeats=10, calls=copies)
    us = {k: round(1e3 * t.median, 2) for k, t in times.items()}
    return {
        "layer": name,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": nbytes,
        "roofline_us": round(1e6 * nbytes / copy, 2),
        "us": us,
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("layer", "dtype", "roofline us", "library us", "best gemv us", "tiles"):
        table.add_column(column, justify="right" if column.endswith("us") else "left", no_wrap=True)
    for r in results:
        best = min((k for k in r["us"] if k.startswith("gemv")), key=lambda k: r["us"][k])
        table.add_row(
            r["layer"],
            r["dtype"],
            f"{r['roofline_us']:.1f}",
            f"{r['us']['library']:.1f}",
            f"{r['us'][best]:.1f}",
            best.removeprefix("gemv "),
        )
    Console(width=120, highlight=False).print(table)


def main() -> int:
    parser = parser_of(__doc__, "gemv")
    parser.add_argument("--tiles", choices=("table", "all"), default="table")
    options = parser.parse_args()
    if lacks_gpu("gemv.py"):
        return 2
    output = output_of(options)
    torch.manual_seed(0)
    copy = timer.copy_speed()
    results: list[dict[str, Any]] = []
    for name, dtype in itertools.product(GEMV_SIZES, (FP8, BF16)):
        if name == "lm_head" and dtype == FP8:
            continue
        results.append(measure(name, dtype, CANDIDATES["gemv"] if options.tiles == "all" else [], copy))
        torch.cuda.empty_cache()
        write_result(output, {"copy_bytes_per_s": copy, "layers": results})
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
