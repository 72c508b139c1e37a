"""One sequence of a million tokens through the gated delta rule: state and output against fp64.

    python benchmarks/kernels/million_tokens.py --output benchmarks/results/cpu/million-tokens.json
    python benchmarks/kernels/million_tokens.py --device cuda --output benchmarks/results/h200/million-tokens.json

One layer, four heads whose memory is some 1, 100, 10,000 and 1,000,000 tokens long; random inputs in fp32. The truth is
the chunk form in fp64, which at every length that is looked at is held against the specification, token by token in
fp64, over the last block. Beside it, over the same tokens:

    steps     the specification in fp32: what the rounding of a state costs that is carried a million times
    prefill   the op in calls of --block tokens, its state carried: chunks in plain torch on a CPU, the kernels on a GPU
    decode    the op token by token: the kernel, on a GPU; on a CPU that is `steps`

Gate: wherever it is looked at, an op's state, and its last WINDOW outputs, are no further from fp64 (||a - b|| / ||b||,
each head by itself) than those of `steps` plus 1e-5.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from jet_export.kernels.form import Form
from jet_export.kernels.gated_delta_rule import chunk_gated_delta_rule_ref, gated_delta_rule_ref
from jet_export.utils.environment import write_result

TOKENS = 2**20
DECAYS = (-1.0, -1e-2, -1e-4, -1e-6)  # the mean of each head's g
K, V = 64, 16  # columns of the state do not interact
WINDOW = 256
SLACK = 1e-5
TRUTH = 1e-11  # between two forms in fp64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k [T, H, K], v [T, H, V], beta, g [T, H]
Call = Callable[[Inputs, Tensor], Tensor]  # (inputs, state [1, H, K, V], updated in place) -> o [T, H, V]


@dataclass(frozen=True, kw_only=True)
class Error:
    """Of one form, behind so many tokens."""

    form: str
    tokens: int
    g: float  # the head's decay
    state: float
    output: float


def inputs(block: int, tokens: int, seed: int) -> Inputs:
    """The tokens of this block, in fp32 on the CPU."""
    rng, H = torch.Generator().manual_seed(seed * 1_000_003 + block), len(DECAYS)
    q, k = (torch.randn(tokens, H, K, generator=rng) for _ in range(2))
    v = torch.randn(tokens, H, V, generator=rng)
    beta = torch.randn(tokens, H, generator=rng).sigmoid()
    g = torch.tensor(DECAYS) * (0.5 + torch.rand(tokens, H, generator=rng))
    return q, k, v, beta, g


def chunks(x: Inputs, state: Tensor) -> Tensor:
    """The chunk form in plain torch, in the state's dtype."""
    q, k, v, beta, g = (t[None].to(state.dtype) for t in x)
    o, final = chunk_gated_delta_rule_ref(q, k, v, beta, g, state)
    state.copy_(final)
    return o[0]


def steps(x: Inputs, state: Tensor) -> Tensor:
    """The specification, in the state's dtype."""
    q, k, v, beta, g = (t[None].to(state.dtype) for t in x)
    o, final = gated_delta_rule_ref(q, k, v, beta, g, state)
    state.copy_(final)
    return o[0]


class Op:
    """`jet::gated_delta_rule` on one sequence, `at_once` tokens a call; 0: all."""

    def __init__(self, form: Form, at_once: int) -> None:
        self.form, self.at_once = form, at_once

    def __call__(self, x: Inputs, state: Tensor) -> Tensor:
        device = state.device
        x = tuple(t.to(device) for t in x)  # type: ignore[assignment]
        n = self.at_once or len(x[0])
        bounds, slots, held = (torch.tensor(t, dtype=torch.int32, device=device) for t in ([0, n], [0], [1]))
        outputs = []
        for begin in range(0, len(x[0]), n):
            call = [t[begin : begin + n] for t in x]
            outputs.append(
                torch.ops.jet.gated_delta_rule(*call, state, bounds, slots, held, int(self.form), None, None, 1)
            )
        return torch.cat(outputs)


def forms(device: str) -> dict[str, Call]:
    prefill: dict[str, Call] = {"steps": steps, "prefill": Op(Form.PREFILL, 0)}
    return prefill if device == "cpu" else {**prefill, "decode": Op(Form.DECODE, 1)}


@torch.inference_mode()
def run(forms: dict[str, Call], device: str, lengths: list[int], block: int, seed: int) -> Iterator[list[Error]]:
    """The errors of every form at each length, a multiple of `block`."""
    exact = torch.zeros(1, len(DECAYS), K, V, dtype=torch.float64)
    states = {name: exact.float().to("cpu" if name == "steps" else device) for name in forms}
    for i in range(max(lengths) // block):
        x = inputs(i, block, seed)
        before = exact.clone()
        truth = chunks(x, exact)
        found = {name: form(x, states[name]) for name, form in forms.items()}
        if (i + 1) * block in lengths:
            check_truth(truth, exact, steps(x, before), before)
            yield [
                Error(form=name, tokens=(i + 1) * block, g=g, state=state, output=output)
                for name in forms
                for g, state, output in zip(
                    DECAYS,
                    relative(states[name][0], exact[0], (1, 2)),
                    relative(found[name][-WINDOW:], truth[-WINDOW:], (0, 2)),
                    strict=True,
                )
            ]


def check_truth(o: Tensor, state: Tensor, o_steps: Tensor, state_steps: Tensor) -> None:
    """Raises AssertionError unless both forms in fp64 give the same."""
    found = relative(state[0], state_steps[0], (1, 2)) + relative(o, o_steps, (0, 2))
    assert max(found) < TRUTH, f"chunks and steps differ in fp64: {found}"


def relative(a: Tensor, b: Tensor, dims: tuple[int, int]) -> list[float]:
    """||a - b|| / ||b|| of each head."""
    errors: list[float] = ((a.double().cpu() - b).square().sum(dims) / b.square().sum(dims)).sqrt().tolist()
    return errors


def worse(errors: list[Error]) -> list[Error]:
    """Those that the gate does not let through."""
    least = {(e.tokens, e.g): e for e in errors if e.form == "steps"}
    return [
        e
        for e in errors
        if not (e.state <= least[e.tokens, e.g].state + SLACK and e.output <= least[e.tokens, e.g].output + SLACK)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--block", type=int, default=4096, help="tokens of a prefill call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths = [n for n in (2**12, 2**14, 2**16, 2**18, 2**20) if n < args.tokens and n % args.block == 0]
    lengths.append(args.tokens // args.block * args.block)
    began, errors = time.monotonic(), list[Error]()
    for found in run(forms(args.device), args.device, lengths, args.block, args.seed):
        errors += found
        print(f"{found[0].tokens:,} tokens, {time.monotonic() - began:.0f} s", flush=True)
        for e in found:
            print(f"  {e.form:<8} g {e.g:<7g} state {e.state:.1e}  output {e.output:.1e}", flush=True)
    bad = worse(errors)
    shape = {"heads": len(DECAYS), "head_k_dim": K, "head_v_dim": V, "block": args.block, "window": WINDOW}
    result = {"device": args.device, **shape, "seconds": time.monotonic() - began, "passed": not bad}
    write_result(args.output, {**result, "errors": [asdict(e) for e in errors]})
    print("FAILED" if bad else "passed", *bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
