"""A decode step of jet_block whose state is written every L tokens, beside a write at every token, on this GPU.

    python benchmarks/kernels/state_intervals.py [--models 2b] [--batch 8,64,128] [--intervals 1,2,4,8,16]
                                                 [--tokens 1,5] [--tiles delta_rule_deferred]

Microseconds of a layer's step, the mean over an interval: a CUDA graph takes several layers with states of their own
through L steps. `bytes` are those of the state, read at every step and written once in L tokens, and of the step
buffer: (L + 1) / 2 held tokens read on average, those of the step appended. First the states and outputs after two
intervals are compared with those of a write at every token. --tokens R: more than one are a verifying step (the form
VERIFY), all of whose tokens are kept. --tiles OP: every candidate of that op of the table of configurations.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from arguments import lacks_gpu, output_of, parser_of
from block_cases import MODELS, block_inputs
from candidates import CANDIDATES
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jet_export.bench import timer
from jet_export.kernels import configs
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import EXTRA, NO_BUFFER, buffer_rows
from jet_export.kernels.step_buffer import current_state
from jet_export.utils.environment import write_result

FIRST = 64  # tokens held before the first step
BOUND = 2e-3  # of bf16 outputs and fp32 states, beside a write at every token


class Layer:
    """The inputs of a layer of B sequences, `tokens` of each, and its pools."""

    def __init__(self, model: str, batch: int, interval: int, seed: int, tokens: int = 1) -> None:
        torch.manual_seed(seed)
        *inputs, self.context, H, K, V, eps = block_inputs([tokens] * batch, model, context=FIRST)
        self.inputs, self.sizes, self.form = inputs, (H, K, V, eps), Form.VERIFY if tokens > 1 else Form.DECODE
        self.buffer: tuple[Any, ...] = NO_BUFFER
        if tokens > 1:  # the convolution's state is a ring
            ring = batch, 3 + tokens, H * V
            self.inputs[6] = torch.randn(ring, device="cuda", dtype=torch.bfloat16)
        if interval > 1 or tokens > 1:
            rows = buffer_rows(interval, tokens if tokens > 1 else 0)
            pool = torch.zeros(batch, H, rows, K + V + EXTRA, device="cuda")
            self.buffer = pool, torch.full((batch, H), FIRST, device="cuda", dtype=torch.int32), interval

    def fill(self) -> None:
        """Makes the next step one that writes the state."""
        if self.buffer != NO_BUFFER:
            self.buffer[1].fill_(FIRST - self.buffer[2])

    def step(self, context: Tensor) -> Tensor:
        out: Tensor = torch.ops.jet.jet_block(*self.inputs, context, *self.sizes, int(self.form), *self.buffer, None)
        return out

    def state(self, steps: int) -> Tensor:
        """[B, H, K, V] after so many steps."""
        slots, pool, position = self.inputs[-1], *self.buffer[:2]
        return current_state(self.inputs[7], pool, position, slots, self.context + steps, torch.float32)


def work(model: str, batch: int, interval: int, tokens: int = 1) -> int:
    """Bytes of a layer's step that the state and its buffer cost, the mean of an interval."""
    H, K, V, *_ = MODELS[model]
    state, token = 4 * K * V, 4 * (K + V + EXTRA)
    buffer = token * ((interval + 1) / 2 + tokens) if interval > 1 or tokens > 1 else 0
    return int(batch * H * (state + state / -(-interval // tokens) + buffer))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(model: str, interval: int) -> float:
    """The largest relative error of outputs and state over two intervals, beside a write at every token."""
    plain, held = (Layer(model, 3, L, seed=1) for L in (1, interval))
    errors = []
    for s in range(2 * interval):
        errors.append(relative(held.step(held.context + s), plain.step(plain.context + s)))
        errors.append(relative(held.state(s + 1), plain.state(s + 1)))
    if not max(errors) <= BOUND:
        raise ValueError(f"{model}, interval {interval}: error {max(errors):.1e}")
    return max(errors)


def measure(model: str, batch: int, interval: int, tokens: int, op: str | None, copy: float) -> dict[str, Any]:
    nbytes = work(model, batch, 1)
    layers = [Layer(model, batch, interval, seed, tokens) for seed in range(max(2, min(24, int(6e8 / nbytes))))]
    steps = max(interval, 4)
    contexts = [layers[0].context + s * tokens for s in range(steps)]

    def run() -> None:
        for layer in layers:
            layer.fill()
        for context, layer in itertools.product(contexts, layers):
            layer.step(context)

    variants: dict[str, Callable[[], Any]] = {}
    for use in CANDIDATES[op] if op else [{}]:
        if op:
            with configs.override(op, use):
                variants[" ".join(f"{k}={v}" for k, v in use.items())] = timer.capture(run)
        else:
            variants["table"] = timer.capture(run)
    times = timer.compare(variants, repeats=7, calls=steps * len(layers))
    moved = work(model, batch, interval, tokens)
    return {
        "model": model,
        "batch": batch,
        "interval": interval,
        "tokens": tokens,
        "error": check(model, interval) if tokens == 1 else None,
        "bytes": moved,
        "roofline_us": round(1e6 * moved / copy, 2),
        "us": {k: round(1e3 * t.median, 2) for k, t in times.items()},
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("model", "batch", "interval", "tokens", "us", "of roofline", "of a write a token", "tiles"):
        table.add_column(column, justify="left" if column in ("model", "tiles") else "right", no_wrap=True)
    best = {(r["model"], r["batch"], r["interval"], r["tokens"]): min(r["us"].values()) for r in results}
    for r in results:
        key = (r["model"], r["batch"], r["interval"], r["tokens"])
        plain = (*key[:2], 1, 1)
        share = best[key] / best[plain] if plain in best else None
        tiles = min(r["us"], key=lambda k: r["us"][k])
        ratio = "" if share is None else f"{share:.2f}"
        sizes = (str(r[n]) for n in ("batch", "interval", "tokens"))
        table.add_row(
            r["model"], *sizes, f"{best[key]:.1f}", f"{r['roofline_us'] / best[key]:.0%}", ratio, tiles
        )  # fmt: skip
    Console(width=140, highlight=False).print(table)


def main() -> int:
    parser = parser_of(__doc__, "state_intervals")
    parser.add_argument("--models", default="2b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batch", default="8,64,128", help="sequences")
    parser.add_argument("--intervals", default="1,2,4,8,16", help="tokens from write to write")
    parser.add_argument("--tokens", default="1", help="of a sequence in a step")
    ops = "delta_rule_decode", "delta_rule_deferred", "delta_rule_inputs", "delta_rule_verify"
    parser.add_argument("--tiles", choices=ops, help="every candidate of this op")
    options = parser.parse_args()
    if lacks_gpu("state_intervals.py"):
        return 2
    output, copy = output_of(options), timer.copy_speed()
    numbers = ([int(n) for n in text.split(",")] for text in (options.batch, options.intervals, options.tokens))
    results: list[dict[str, Any]] = []
    for model, batch, interval, tokens in itertools.product(options.models.split(","), *numbers):
        results.append(measure(model, batch, interval, tokens, options.tiles, copy))
        torch.cuda.empty_cache()
        write_result(output, {"copy_bytes_per_s": copy, "layers": results})
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
