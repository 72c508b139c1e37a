"""Imports flash-linear-attention with few autotuning candidates a kernel, so that a comparison takes seconds.

Kept are the candidates that its autotuner picks among on Hopper for these head sizes; where several can win (the state
recurrence, the output kernel, the WY kernels) more than one stays, and FLA's own autotuner chooses.
As a program it compiles them into Triton's cache and times nothing:

    python benchmarks/kernels/fla_pinned.py H K V
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

os.environ["FLA_CACHE_RESULTS"] = "0"
KEEP = {
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": lambda c: c.num_warps == 4 and c.num_stages in (2, 3),
    "chunk_fwd_kernel_o": lambda c: c.kwargs["BK"] >= 64,
    "recompute_w_u_fwd_kernel": lambda c: c.num_warps == 4 and c.num_stages in (2, 3),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": lambda c: c.kwargs["BK"] == 64 and c.num_warps in (1, 2, 4),
}


@contextmanager
def without_our_kernels() -> Iterator[None]:
    """Inside, FLA can be imported: transformers, which it imports, takes any module called `kernels` (ours: this
    folder's, the repository's) for the PyPI package of that name."""
    path = sys.path[:]
    sys.path[:] = [p for p in path if not ((Path(p) / "kernels.py").exists() or (Path(p) / "kernels").is_dir())]
    try:
        yield
    finally:
        sys.path[:] = path


def import_fla(compile_only: bool = False) -> Any:
    """The module fla.ops.gated_delta_rule, or None where FLA is not installed."""
    from triton.runtime import autotuner

    init = autotuner.Autotuner.__init__

    def pinned(self, fn, arg_names, configs, *args, **kwargs):
        keep = KEEP.get(getattr(fn, "__name__", ""))
        configs = [c for c in configs if keep(c)] if keep else configs[len(configs) // 2 :][:1]
        init(self, fn, arg_names, configs, *args, **kwargs)
        if compile_only:
            self._do_bench = lambda call, quantiles: call() or [0.0, 0.0, 0.0]

    autotuner.Autotuner.__init__ = pinned
    try:
        with without_our_kernels():
            from fla.ops import gated_delta_rule
    except ImportError as error:
        print(f"FLA is not compared with: {error}")
        return None
    return gated_delta_rule


def rule_inputs(B: int, T: int, H: int, K: int, V: int, seed: int = 0) -> tuple:
    """q, k, v, beta bf16 and g fp32 [B, T, H, ...], gates as a JetBlock's published initialisation gives them."""
    r = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=r, device="cuda", dtype=torch.bfloat16)

    A = torch.empty(H, device="cuda").uniform_(1, 16, generator=r)
    dt = torch.empty(H, device="cuda").uniform_(-6.9, -2.3, generator=r).exp()  # log-uniform in [1e-3, 1e-1]
    dt_bias = dt + torch.log(-torch.expm1(-dt))
    g = -A * torch.nn.functional.softplus(0.5 * rand(B, T, H).float() + dt_bias)
    return rand(B, T, H, K), rand(B, T, H, K), rand(B, T, H, V), rand(B, T, H).sigmoid(), g


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("H", "K", "V"):
        parser.add_argument(name, type=int)
    H, K, V = vars(parser.parse_args()).values()
    rule = import_fla(compile_only=True)
    if rule is not None:
        for B, T in ((1, 128), (2, 128)):
            q, k, v, beta, g = rule_inputs(B, T, H, K, V)
            S = torch.zeros(B, H, K, V, device="cuda")
            for norm in (False, True):
                rule.chunk_gated_delta_rule(
                    q, k, v, g, beta, initial_state=S, output_final_state=True, use_qk_l2norm_in_kernel=norm
                )
        torch.cuda.synchronize()
