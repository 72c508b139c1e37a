"""Speed of the JetBlock ops on this GPU, beside FLA's delta rule where it is installed.

    python benchmarks/kernels.py [--models 2b,4b] [--output benchmarks/results/kernels_jet.json]

Correctness comes first, and without it there are no figures. Prefill is timed per call, decode per layer in a CUDA
graph that walks through several layers' states, so that they do not stay in L2. FLA's figures are its delta rule alone:
no convolution, SiLU, normalisation of q and k, gates or gated norm. Attention: kernels_attention.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fla_pinned import import_fla, rule_inputs
from torch import Tensor

from jet_export import bench
from jet_export.kernels.jet_block import jet_block_ref

MODELS = {"2b": (12, 96, 256), "4b": (16, 128, 256)}  # H, K, V
PREFILL = [(1, 2048), (16, 2048), (1, 16384), (1, 65536)]  # B, T
DECODE = [1, 64, 128, 256, 512]


def block_inputs(lens: list[int], model: str, state_dtype: torch.dtype = torch.float32, context: int = 0) -> tuple:
    """Arguments of jet_block without `decode`, bf16; gates by the published initialisation."""
    H, K, V = MODELS[model]
    N, T, D = len(lens), sum(lens), H * V

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    def i32(x):
        return torch.tensor(x, device="cuda", dtype=torch.int32)

    A_log = torch.empty(H, device="cuda").uniform_(1, 16).log()
    dt = torch.empty(H, device="cuda").uniform_(-6.9, -2.3).exp()
    return (
        rand(T, 2 * H * K + 2 * D + D // 8), rand(T, 2 * H), rand(T, 4 * D).mul_(0.5), A_log,
        dt + torch.log(-torch.expm1(-dt)), 1 + 0.1 * rand(V), rand(N, 3, D), rand(N, H, K, V, dtype=state_dtype),
        i32([0, *lens]).cumsum(0, dtype=torch.int32), torch.arange(N, device="cuda", dtype=torch.int32),
        i32([context] * N), H, K, V, 1e-5,
    )  # fmt: skip


def rel(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def correctness(model: str) -> dict[str, float]:
    """Relative errors against fp64 of a small prefill and a decode step."""
    errors = {}
    for name, lens, decode in (("prefill", [1, 65, 300], False), ("decode", [1] * 8, True)):
        args = block_inputs(lens, model, context=4)
        exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        want = jet_block_ref(*exact, decode)
        errors[name] = rel(torch.ops.jet.jet_block(*args, decode), want)
        errors[f"{name} state"] = rel(args[7], exact[7])
    return errors


def prefill(model: str, fla: Any) -> list[dict]:
    H, K, V = MODELS[model]
    rows = []
    for B, T in PREFILL:
        args = block_inputs([T] * B, model)
        q, k, v, beta, g = rule_inputs(B, T, H, K, V)
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1).bfloat16() for x in (q, k))
        packed, state = [x.flatten(0, 1) for x in (q, k, v, beta, g)], args[7].clone()
        variants: dict[str, Callable[[], Any]] = {
            "jet_block": lambda a=args: torch.ops.jet.jet_block(*a, False),
            "delta rule": lambda p=packed, a=args, s=state: torch.ops.jet.gated_delta_rule(*p, s, *a[8:11], False),
        }
        if fla is not None:
            variants["fla delta rule"] = lambda q=q, k=k, v=v, beta=beta, g=g, s=state: fla.chunk_gated_delta_rule(
                q, k, v, g, beta, initial_state=s, output_final_state=True
            )
        times = bench.compare(variants, graph=True, repeats=15)
        tokens = B * T
        moved = tokens * 2 * (2 * H * K + 7 * H * V)  # q, k, u, gate, kappa read, the result written
        flops = tokens * H * (2 * 64 * (3 * K + V) + 2 * (64 * V + 3 * K * V))
        split = bench.kernel_times(variants["jet_block"])
        rows.append({"B": B, "T": T, "ms": {n: vars(t) for n, t in times.items()}, "kernels_ms": split,
                     "bytes": moved, "flops": flops})  # fmt: skip
        print(f"{model} prefill B{B} T{T}: " + "; ".join(f"{n} {t}" for n, t in times.items()))
        print("   " + ", ".join(f"{n} {t:.3f}" for n, t in split.items()), flush=True)
    return rows


def decode(model: str, fla: Any, copy: float) -> list[dict]:
    H, K, V = MODELS[model]
    rows = []
    for B in DECODE:
        for dtype in (torch.float32, torch.bfloat16):
            moved = 2 * B * H * K * V * dtype.itemsize
            layers = max(2, min(24, int(4e8 / moved)))
            sets = [block_inputs([1] * B, model, dtype, context=4) for _ in range(layers)]
            variants = {"jet_block": lambda s=sets: [torch.ops.jet.jet_block(*a, True) for a in s]}
            if fla is not None and dtype == torch.float32:
                q, k, v, beta, g = rule_inputs(B, 1, H, K, V)
                variants["fla delta rule"] = lambda s=sets, q=q, k=k, v=v, g=g, b=beta: [
                    fla.fused_recurrent_gated_delta_rule(
                        q, k, v, g=g, beta=b, initial_state=a[7], output_final_state=True, use_qk_l2norm_in_kernel=True
                    )
                    for a in s
                ]
            times = bench.compare(variants, graph=True, repeats=15, calls=layers)
            share = {n: moved / (t.median * 1e-3) / copy for n, t in times.items()}
            rows.append({"B": B, "state": str(dtype).removeprefix("torch."), "state_bytes": moved,
                         "ms": {n: vars(t) for n, t in times.items()}, "share_of_copy": share})  # fmt: skip
            shown = "; ".join(f"{n} {t}, {share[n]:.1%} of copy" for n, t in times.items())
            print(f"{model} decode B{B} {dtype}: {shown}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="2b,4b")
    parser.add_argument("--output", default=Path(__file__).parent / "results/kernels_jet.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    models = options.models.split(",")
    result: dict[str, Any] = {"errors": {model: correctness(model) for model in models}}
    print(result["errors"])
    if not all(e < 1e-2 for errors in result["errors"].values() for e in errors.values()):
        print("wrong results: no speed to report")
        return 1
    fla, copy = import_fla(), bench.copy_speed()
    result["copy_bytes_per_s"] = copy
    print(f"copy: {copy / 1e12:.2f} TB/s", flush=True)
    for model in models:
        result[model] = {"prefill": prefill(model, fla), "decode": decode(model, fla, copy)}
        bench.write_result(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
