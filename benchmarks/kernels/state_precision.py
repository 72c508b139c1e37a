"""What a recurrent state in fp32, bf16, or bf16 with stochastic rounding loses over a long decode, against fp64.

    python benchmarks/kernels/state_precision.py --output benchmarks/results/cpu/state_precision.json

The decode step of the gated delta rule (SPEC: S = exp(g) S; S += k beta (v - S^T k)^T; o = S^T q) is run token by token
on random inputs - unit keys and queries, normal values, beta = sigmoid(normal) - with one constant decay g a sequence.
Arithmetic inside a step is fp32 for all three, as in the kernel; only what is stored between steps differs. Columns of
the state do not interact, so 16 of them stand for all. The arithmetic is the same on any device; this runs on a CPU.

jet-tiny's recall is measured too, fed token by token, with its states stored in fp32 and in bf16 (rounded to nearest).

Gate: bf16 state may be used for headline figures if its output error stays below the rounding of a bf16 output
(2^-8 relative) at every decay and length.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.runner import Runner
from jet_export.utils.environment import environment
from jet_export.verify.quality import recall

K, V = 128, 16
DECAYS = (-1e-5, -1e-4, -1e-3, -1e-2, -1e-1, -1.0)
LENGTHS = (1024, 16384, 65536, 262144)
STORED = ("float32", "bfloat16", "bfloat16, stochastic rounding")
WINDOW = 256  # outputs of the last tokens that the error is taken over
GATE = 2.0**-8


def stochastic_bf16(x: Tensor, rng: torch.Generator) -> Tensor:
    """x rounded to bf16, up with the probability that makes the mean exact."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=rng, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32)


def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """S [..., G, K, V], q, k [G, K], v [G, V], beta [G], decay = exp(g) [G, 1, 1] -> (S, o [..., G, V])."""
    S = S * decay
    delta = beta[:, None] * (v - torch.einsum("...gkv,gk->...gv", S, k))
    S = S + k[:, :, None] * delta[..., None, :]
    return S, torch.einsum("...gkv,gk->...gv", S, q)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def relative(a: Tensor, b: Tensor) -> list[float]:
    """||a - b|| / ||b|| of each decay: [G, ...]."""
    dims = tuple(range(1, b.dim()))
    return ((a.double() - b).square().sum(dims) / b.square().sum(dims)).sqrt().tolist()


def simulate(lengths: tuple[int, ...], seed: int) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(seed)
    G = len(DECAYS)
    decay = torch.tensor(DECAYS, dtype=torch.float64).exp().reshape(G, 1, 1)
    exact = torch.zeros(G, K, V, dtype=torch.float64)
    kept = torch.zeros(len(STORED), G, K, V)
    outputs: list[tuple[Tensor, Tensor]] = []
    rows: list[dict[str, Any]] = []
    for t in range(1, max(lengths) + 1):
        q, k = (
            unit(torch.randn(2, G, K, generator=rng, dtype=torch.float64)) * torch.tensor([K**-0.5, 1.0])[:, None, None]
        )
        v = torch.randn(G, V, generator=rng, dtype=torch.float64)
        beta = torch.randn(G, generator=rng, dtype=torch.float64).sigmoid()
        exact, o = step(exact, q, k, v, beta, decay)
        kept, o_kept = step(kept, q.float(), k.float(), v.float(), beta.float(), decay.float())
        kept[1] = kept[1].bfloat16().float()
        kept[2] = stochastic_bf16(kept[2], rng)
        outputs = [*outputs[-WINDOW + 1 :], (o, o_kept)]
        if t in lengths:
            o_exact = torch.stack([a for a, _ in outputs], 1)  # [G, window, V]
            for i, stored in enumerate(STORED):
                o_i = torch.stack([b[i] for _, b in outputs], 1)
                errors = zip(DECAYS, relative(kept[i], exact), relative(o_i, o_exact), strict=True)
                rows += [
                    {"tokens": t, "stored": stored, "g": g, "state_error": s, "output_error": e} for g, s, e in errors
                ]
            print(table(rows, t), flush=True)
    return rows


def table(rows: list[dict[str, Any]], tokens: int) -> str:
    lines = [f"after {tokens} tokens: output error (state error) against fp64"]
    for stored in STORED:
        cells = [r for r in rows if r["tokens"] == tokens and r["stored"] == stored]
        shown = "  ".join(f"g {r['g']:g}: {r['output_error']:.1e} ({r['state_error']:.1e})" for r in cells)
        lines.append(f"  {stored:<30} {shown}")
    return "\n".join(lines)


def jet_tiny_recall() -> dict[str, dict[str, float]]:
    """Share of right answers by distance, the states stored after every token."""
    model = JetNemotronForCausalLM.from_pretrained("jet-tiny")
    limits = Limits(max_batch_size=1, max_seq_len=2048, prefill_chunk=1)
    runners = {}
    # quality.recall's own names: "engine" is what is judged, "unquantised" what it is compared with.
    for name, state_dtype in (("engine", torch.bfloat16), ("unquantised", torch.float32)):
        runners[name] = Runner(EagerEngine(model, limits, kv_dtype=model.dtype, state_dtype=state_dtype))
    found = recall(runners, Tokenizer.from_file(str(JET_TINY_DIR / "tokenizer.json")))
    names = {"engine": "bfloat16", "unquantised": "float32", "queries": "queries"}
    return {distance: {names[k]: v for k, v in shares.items()} for distance, shares in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = simulate(tuple(args.lengths), args.seed)
    worst = {s: max(r["output_error"] for r in rows if r["stored"] == s) for s in STORED}
    passed = {s: math.isfinite(w) and w <= GATE for s, w in worst.items()}
    for s in STORED:
        print(f"{s}: worst output error {worst[s]:.1e}, gate {GATE:.1e}: {'passed' if passed[s] else 'FAILED'}")
    found = jet_tiny_recall()
    for distance, shares in found.items():
        print(f"jet-tiny recall, {distance} tokens back: " + ", ".join(f"{k} {v:.4g}" for k, v in shares.items()))
    result = {"environment": environment(), "gate": GATE, "worst_output_error": worst, "passed": passed, "rows": rows}
    result["jet_tiny_recall"] = found
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
