"""Linear layers of 2 to 128 tokens: jet::skinny_linear and skinny_partials beside the library's product, one GPU.

    python benchmarks/kernels/skinny_gemm.py [--tiles all] [--rows 8,64] [--output FILE]

jet-2b's sizes. Times are a call's in a CUDA graph over copies of the weights that do not fit L2, launch gaps included.
The roofline is reading W once at copy speed. gate_up_proj is timed with its gate and the codes of its output, for which
the library needs a kernel more (timed with it); o_proj and down_proj as parts, whose sum is timed with the residual and
the norm that follow (add_norm), beside the library's product with PyTorch's compiled sum, norm and codes. --tiles table
(the default): the configuration in use; all: every candidate, for kernels/configs.json.
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
from jet_export.kernels import (
    add_norm,  # noqa: F401  (registers the op)
    configs,
    skinny_gemm,
)
from jet_export.utils.environment import write_result

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
COPIES = 2.4e8  # bytes of weights that a graph walks through
BOUND = 8e-3  # of bf16 results; of codes, whose steps are 2^-4, half of one on top
SHARED = 2e5  # bytes of shared memory, with some to spare
SPLIT, GATED = ("o_proj", "down_proj"), ("gate_up_proj",)


class Layer:
    """One linear layer of M tokens with what follows it, by the library and by our kernels."""

    def __init__(self, name: str, dtype: torch.dtype, rows: int) -> None:
        self.name, self.dtype, self.rows = name, dtype, rows
        self.N, self.K = GEMV_SIZES[name]
        self.split, self.gated = name in SPLIT, name in GATED
        r = torch.Generator("cuda").manual_seed(rows)
        self.x = torch.randn(rows, self.K, device="cuda", dtype=BF16, generator=r).to(dtype)
        self.one = torch.ones(1, device="cuda")
        self.scale = self.one * 0.5 if dtype == FP8 else None  # of the codes that the next layer takes
        self.scales = (self.one, self.one) if dtype == FP8 else (None, None)
        self.h = torch.randn(rows, self.N, device="cuda", dtype=BF16, generator=r)
        self.norm = torch.rand(self.N, device="cuda", dtype=BF16, generator=r) + 0.5
        self.behind = torch.compile(self._behind)

    def product(self, w: Tensor) -> Tensor:
        if self.dtype == FP8:
            return torch._scaled_mm(self.x, w.t(), self.one, self.one, out_dtype=BF16, use_fast_accum=False)
        return torch.nn.functional.linear(self.x, w)

    def _behind(self, y: Tensor) -> Tensor:
        """What the graph does with the product today, which Inductor fuses into a kernel."""
        if self.gated:
            gate, up = y.float().chunk(2, -1)
            y = (torch.nn.functional.silu(gate).to(BF16).float() * up).to(BF16)
        if self.split:
            h = (self.h.float() + y.float()).to(BF16).float()
            y = (self.norm.float() * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))).to(BF16)
        if (self.gated or self.split) and self.scale is not None:
            return (y.float() / self.scale).clamp(-448, 448).to(FP8)
        return y

    def library(self, w: Tensor) -> Tensor:
        y = self.product(w)
        return self.behind(y) if self.gated or self.split else y

    def ours(self, w: Tensor, splits: int) -> Tensor:
        if self.split:
            parts = torch.ops.jet.skinny_partials(self.x, w, splits, [])
            fp8 = self.scale is not None
            _, a, codes, _ = torch.ops.jet.add_norm(
                parts, *self.scales, None, self.h, self.norm, self.scale, None, 1e-6, not fp8
            )
            return codes if fp8 else a
        scale = self.scale if self.gated else None
        y: Tensor = torch.ops.jet.skinny_linear(self.x, w, *self.scales, None, scale, self.gated, BF16, [])
        return y

    def exact(self, w: Tensor) -> Tensor:
        y = self.x.double() @ w.double().t()
        if self.split:
            h = self.h.double() + y
            return self.norm.double() * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))
        return torch.nn.functional.silu(y[:, : self.N // 2]) * y[:, self.N // 2 :] if self.gated else y


def sensible(use: dict[str, int], layer: Layer) -> bool:
    """Whether a candidate fits a layer, and is worth its time: of codes, 128 bytes of a row at once and more, of
    values, at most 256; parts of one width."""
    tile = use["BK"] * (use["BN"] * (2 if layer.gated else 1) + max(skinny_gemm.MAX_ROWS // 2, layer.rows))
    fits = use["STAGES"] * tile * layer.dtype.itemsize <= SHARED
    if (use["SPLITS"] > 1) != layer.split or use["BK"] * use["SPLITS"] > layer.K or not fits:
        return False
    return use["BK"] == 128 if layer.split else use["BK"] >= 128 if layer.dtype == FP8 else use["BK"] <= 128


def measure(layer: Layer, tiles: list[dict[str, int]], copy: float) -> dict[str, Any]:
    """Microseconds of every variant of one layer; a wrong one raises."""
    nbytes = layer.N * layer.K * layer.dtype.itemsize
    copies = max(2, min(40, int(COPIES / nbytes)))
    weights = [(torch.randn(layer.N, layer.K, device="cuda", dtype=BF16) / 8).to(layer.dtype) for _ in range(copies)]
    exact = layer.exact(weights[0])
    variants: dict[str, Callable[[], Any]] = {}

    def add(label: str, call: Callable[[Tensor], Tensor]) -> None:
        found = call(weights[0])
        value = found.double() * (0.5 if found.dtype == FP8 else 1.0)
        if found.dtype == FP8:  # where the codes saturate there is nothing to compare
            value, want = (t.clamp(-224, 224) for t in (value, exact))
        else:
            want = exact
        error = float((value - want).norm() / want.norm())
        if not error <= BOUND + (2**-5 if found.dtype == FP8 else 0.0):
            raise ValueError(f"{layer.name} {layer.dtype} {layer.rows} rows, {label}: error {error:.1e}")
        variants[label] = timer.capture(lambda: [call(w) for w in weights])

    add("library", layer.library)
    for use in tiles or [skinny_gemm.configuration(weights[0], layer.gated, layer.split)]:
        if tiles and not sensible(use, layer):
            continue
        with configs.override("skinny_gemm", use):
            add("skinny " + " ".join(f"{k}={v}" for k, v in use.items()), partial(layer.ours, splits=use["SPLITS"]))
    times = timer.compare(variants, repeats=10, calls=copies)
    return {
        "layer": layer.name,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "rows": layer.rows,
        "bytes": nbytes,
        "roofline_us": round(1e6 * nbytes / copy, 2),
        "us": {k: round(1e3 * t.median, 2) for k, t in times.items()},
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("layer", "dtype", "rows", "roofline us", "library us", "best of ours us", "tiles"):
        right = column == "rows" or column.endswith("us")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for r in results:
        best = min((k for k in r["us"] if k.startswith("skinny")), key=lambda k: r["us"][k])
        numbers = (f"{v:.1f}" for v in (r["roofline_us"], r["us"]["library"], r["us"][best]))
        table.add_row(r["layer"], r["dtype"], str(r["rows"]), *numbers, best.removeprefix("skinny "))
    Console(width=140, highlight=False).print(table)


def main() -> int:
    parser = parser_of(__doc__, "skinny_gemm")
    parser.add_argument("--tiles", choices=("table", "all"), default="table")
    parser.add_argument("--rows", default="2,8,16,32,64,128", help="tokens, each at most 128")
    parser.add_argument("--layers", default=",".join(GEMV_SIZES))
    parser.add_argument("--dtypes", default="fp8,bf16")
    options = parser.parse_args()
    if lacks_gpu("skinny_gemm.py"):
        return 2
    output = output_of(options)
    torch.manual_seed(0)
    copy = timer.copy_speed()
    results: list[dict[str, Any]] = []
    dtypes = [{"fp8": FP8, "bf16": BF16}[name] for name in options.dtypes.split(",")]
    rows = [int(m) for m in options.rows.split(",")]
    if max(rows) > skinny_gemm.MAX_ROWS:
        parser.error(f"--rows: at most {skinny_gemm.MAX_ROWS}")
    for name, dtype, m in itertools.product(options.layers.split(","), dtypes, rows):
        if name == "lm_head" and dtype == FP8:
            continue
        tiles = CANDIDATES["skinny_gemm"] if options.tiles == "all" else []
        results.append(measure(Layer(name, dtype, m), tiles, copy))
        torch.cuda.empty_cache()
        write_result(output, {"copy_bytes_per_s": copy, "layers": results})
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
