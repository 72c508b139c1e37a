"""The library's FP8 products of prefill, summed in fp32 or in the tensor cores ("fast"), beside bf16, one GPU.

    python benchmarks/kernels/fp8_products.py [--tokens 2048,32768] [--output FILE]

jet-2b's layers. A model's FP8 layers sum in fp32 (`use_fast_accum=False`), which costs the kernel additions outside of
the tensor cores; SGLang and vLLM sum fast. Codes and weights are those of normal numbers, as a calibrated layer has
them. `error` is that of 256 rows of the result against fp64, by norm, rounded to bf16 as the layer does: what the sums
alone add to bf16's own rounding is the difference to `error` of an exact sum, which is printed with them. Medians of
calls in turn; `TFLOP/s` of the layer's products.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from arguments import lacks_gpu, output_of, parser_of
from candidates import GEMV_SIZES
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jet_export.bench import timer
from jet_export.model.fp8 import quantize
from jet_export.utils.environment import write_result

BF16 = torch.bfloat16
LAYERS = ("in_proj", "w2", "o_proj", "gate_up_proj", "down_proj")
CHECKED = 256  # rows that are compared with fp64
BOUND = 1e-2  # of the error: anything more is a wrong product


class Product:
    """One layer's, of `tokens` rows."""

    def __init__(self, name: str, tokens: int) -> None:
        N, K = GEMV_SIZES[name]
        r = torch.Generator("cuda").manual_seed(tokens)
        self.x = torch.randn(tokens, K, device="cuda", dtype=BF16, generator=r)
        self.w = torch.randn(N, K, device="cuda", dtype=BF16, generator=r)
        self.scale = torch.full((1,), 6.0 / 448, device="cuda")  # of six standard deviations
        self.qx, self.qw = quantize(self.x, self.scale), quantize(self.w, self.scale)
        self.flops = 2 * tokens * N * K

    def fp8(self, fast: bool) -> Tensor:
        scales = self.scale, self.scale
        return torch._scaled_mm(self.qx, self.qw.t(), *scales, out_dtype=BF16, use_fast_accum=fast)

    def bf16(self) -> Tensor:
        return self.x @ self.w.t()

    def errors(self) -> dict[str, float]:
        """By norm, against fp64: of both sums, and of an exact one that is rounded."""
        exact = self.qx[:CHECKED].double() @ self.qw.double().t() * self.scale.double() ** 2
        results = {"fp32": self.fp8(False)[:CHECKED], "fast": self.fp8(True)[:CHECKED], "exact": exact.to(BF16)}
        return {name: float((y.double() - exact).norm() / exact.norm()) for name, y in results.items()}


def measure(name: str, tokens: int) -> dict[str, Any]:
    """Raises SystemExit for a result that is wrong: it has no speed."""
    product = Product(name, tokens)
    errors = product.errors()
    if not all(e < BOUND for e in errors.values()):
        raise SystemExit(f"{name}, {tokens} tokens: errors {errors}: no speed to report")
    variants = {"fp32": lambda: product.fp8(False), "fast": lambda: product.fp8(True), "bf16": product.bf16}
    times = timer.compare(variants, repeats=15, graph=True)
    return {
        "layer": name,
        "tokens": tokens,
        "ms": {kind: t.median for kind, t in times.items()},
        "tflops": {kind: product.flops / t.median / 1e9 for kind, t in times.items()},
        "errors": errors,
    }


def main() -> int:
    parser = parser_of(__doc__, "fp8_products")
    parser.add_argument("--tokens", default="2048,32768")
    options = parser.parse_args()
    if lacks_gpu("fp8_products.py"):
        return 2
    rows = [measure(name, tokens) for tokens in map(int, options.tokens.split(",")) for name in LAYERS]
    write_result(output_of(options), {"products": rows})
    table = Table(box=None, header_style="bold")
    for column in ("layer", "tokens", "fp32 ms", "fast ms", "bf16 ms", "fp32 TFLOP/s", "fast"):
        table.add_column(column, justify="right")
    for column in ("error, fp32", "fast", "exact"):
        table.add_column(column, justify="right")
    for row in rows:
        ms, tflops, errors = row["ms"], row["tflops"], row["errors"]
        times = (f"{ms[kind]:.3f}" for kind in ("fp32", "fast", "bf16"))
        speeds = (f"{tflops[kind]:.0f}" for kind in ("fp32", "fast"))
        table.add_row(row["layer"], str(row["tokens"]), *times, *speeds, *(f"{e:.1e}" for e in errors.values()))
    Console(width=150, highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
