"""The linear layers of one token between two mixers: jet::linear_chain beside jet::gemv layer by layer, one GPU.

    python benchmarks/kernels/linear_chain.py [--tiles all] [--dtypes fp8] [--output FILE]

jet-2b's sizes: o_proj, gate_up_proj, down_proj, and the next JetBlock's in_proj, [b | a] and w2. Microseconds of one
such chain in a CUDA graph of as many copies as do not fit L2, launched by programmatic edges, as a decode step is.
`roofline` is reading the weights once at copy speed. "empty": layers of 512 inputs and outputs, whose bytes are
nothing, so that what is left is launches, barriers and latencies. --tiles table (the default): the configuration in
use; all: every candidate, for kernels/configs.json.
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
from torch import Tensor

from jet_export.bench import timer
from jet_export.kernels import (
    configs,
    gemv,  # noqa: F401  (registers the op)
)
from jet_export.kernels.common import dependent_launch
from jet_export.kernels.linear_chain import DOWN, GATE_UP, GENERATOR, IN, OUT, SMALL, linear_chain_ref
from jet_export.runtime.launch_edges import overlap_launches
from jet_export.utils.environment import write_result

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
DTYPES = {"fp8": FP8, "bf16": BF16}
COPIES = 3e8  # bytes of weights that a graph walks through
BOUND = 0.03  # of codes and bf16, through five layers
NAMES = ("o_proj", "gate_up_proj", "down_proj", "in_proj", "ba_proj", "w2")
SIZES = {
    "jet-2b": [*(GEMV_SIZES[name] for name in NAMES[:4]), (24, 1536), GEMV_SIZES["w2"]],
    "empty": [(512, 512), (1024, 512), (512, 512), (512, 512), (24, 512), (512, 384)],
}


class Chain:
    """Weights, scales and biases of one chain."""

    def __init__(self, sizes: list[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
        r = torch.Generator("cuda").manual_seed(seed)
        draw = partial(torch.randn, device="cuda", dtype=BF16, generator=r)
        self.weights = [draw(*s).mul_(s[1] ** -0.5).to(BF16 if i == SMALL else dtype) for i, s in enumerate(sizes)]
        scale = torch.full((1,), 2.0**-5, device="cuda") if dtype == FP8 else None
        self.x_scales = [None if i == SMALL else scale for i in range(len(sizes))]
        one = torch.ones(1, device="cuda") if dtype == FP8 else None
        self.w_scales = [None if i == SMALL else one for i in range(len(sizes))]
        self.biases = [draw(s[0]) if i == GENERATOR else None for i, s in enumerate(sizes)]
        D = sizes[OUT][0]
        self.norms = [draw(D).abs() + 0.5 for _ in range(2)]
        self.x, self.h = draw(1, sizes[OUT][1]), draw(1, D)

    @property
    def nbytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights)

    def args(self) -> tuple[Any, ...]:
        return self.x, self.h, self.weights, self.x_scales, self.w_scales, self.biases, self.norms


def by_gemv(c: Chain, ahead: Chain) -> tuple[Tensor, ...]:
    """As the model does it (model/linear.py); ahead: the chain behind this one."""

    def linear(i: int, a: Tensor, norm: Tensor | None = None, add: Tensor | None = None, **what: Any) -> Tensor:
        y: Tensor = torch.ops.jet.gemv(
            a, c.weights[i], c.x_scales[i], c.w_scales[i], c.biases[i], norm, add,
            c.x_scales[DOWN] if i == GATE_UP else None, 1e-6, what.get("silu", False), what.get("gated", False), BF16,
            what.get("ahead", []),
        )  # fmt: skip
        return y

    h1 = linear(OUT, c.x, add=c.h)
    m = linear(GATE_UP, h1, c.norms[0], gated=True, ahead=[c.weights[DOWN]])
    h2 = linear(DOWN, m, add=h1, ahead=[c.weights[IN]])
    y = linear(IN, h2, c.norms[1], ahead=[c.weights[GENERATOR], ahead.weights[OUT]])
    z = linear(SMALL, h2, c.norms[1])
    R = c.weights[GENERATOR].shape[1]
    return h2, y, z, linear(GENERATOR, y[:, -R:], silu=True, ahead=[ahead.weights[GATE_UP]])


def by_chain(chains: list[Chain]) -> list[tuple[Tensor, ...]]:
    barrier = torch.zeros(1, dtype=torch.int32, device="cuda")
    out = []
    for c in chains:
        *results, barrier = torch.ops.jet.linear_chain(*c.args(), barrier, 1e-6)
        out.append(tuple(results))
    return out


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a graph whose edges are programmatic where kernels wait themselves."""
    with dependent_launch(True):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            call()
    overlap_launches(graph.raw_cuda_graph())
    graph.instantiate()
    return graph.replay


def check(results: tuple[Tensor, ...], chain: Chain) -> None:
    reference: Callable[..., tuple[Tensor, ...]] = linear_chain_ref
    want = reference(*chain.args(), 1e-6)
    for name, got, ref in zip(("h2", "y", "z", "k"), results, want, strict=True):
        error = float((got.float() - ref.float()).norm() / ref.float().norm())
        if not error <= BOUND:
            raise ValueError(f"{name}: error {error:.1e}")


def measure(name: str, dtype: torch.dtype, tiles: list[dict[str, int]], copy: float) -> dict[str, Any]:
    """Microseconds of every variant; a wrong one raises."""
    nbytes = Chain(SIZES[name], dtype, 0).nbytes
    copies = max(2, min(16, int(COPIES / nbytes)))
    chains = [Chain(SIZES[name], dtype, seed) for seed in range(copies)]
    variants: dict[str, Callable[[], Any]] = {}
    behind = [*chains[1:], chains[0]]
    check(by_gemv(chains[0], behind[0]), chains[0])
    variants["gemv"] = captured(lambda: [by_gemv(*pair) for pair in zip(chains, behind, strict=True)])
    for use in tiles or [configs.lookup("linear_chain", dtype=dtype, hidden_size=1536)]:
        label = "chain " + " ".join(f"{k}={v}" for k, v in use.items())
        with configs.override("linear_chain", use):
            for results, chain in zip(by_chain(chains), chains, strict=True):
                check(results, chain)
            variants[label] = captured(lambda: by_chain(chains))
        print(name, dtype, label, "runs", flush=True)
    times = timer.compare(variants, repeats=10, calls=copies)
    us = {k: round(1e3 * t.median, 2) for k, t in times.items()}
    best = min((k for k in us if k != "gemv"), key=us.__getitem__)
    row = {"sizes": name, "dtype": str(dtype).removeprefix("torch."), "bytes": nbytes}
    print(f"{name} {row['dtype']}: roofline {1e6 * nbytes / copy:.1f} us, gemv {us['gemv']}, {best} {us[best]}")
    return {**row, "roofline_us": round(1e6 * nbytes / copy, 2), "us": us}


def main() -> int:
    parser = parser_of(__doc__, "linear_chain")
    parser.add_argument("--tiles", choices=("table", "all"), default="table")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    options = parser.parse_args()
    if lacks_gpu("linear_chain.py"):
        return 2
    output = output_of(options)
    copy = timer.copy_speed()
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = CANDIDATES["linear_chain"] if options.tiles == "all" else []
    if any(use["programs"] > 2 * programs for use in tiles):
        print("linear_chain.py: its candidates are for 132 multiprocessors.", file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    for name, dtype in itertools.product(SIZES, options.dtypes):
        results.append(measure(name, DTYPES[dtype], tiles, copy))
        torch.cuda.empty_cache()
        write_result(output, {"copy_bytes_per_s": copy, "chains": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
