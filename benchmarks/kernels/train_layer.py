"""Training speed of one JetBlock layer, forward and backward, and of the distillation loss, on this GPU.

    python benchmarks/kernels/train_layer.py [--models 2b,4b] [--parts layer,loss] [--tokens 4096] [--no-fla]

`layer`: projections, JetBlock and output projection on --tokens packed tokens of one sequence and of four, beside FLA's
GatedDeltaNet layer of the same heads (with its short convolutions; where FLA refuses its backward pass, its words are
recorded) and beside the same JetBlock layer with the block in plain torch. `loss`: linear_kl beside logits, KL and
cross-entropy in plain torch, 151,936 words. Correctness comes first, and without it there are no figures: gradients
against fp64, no worse than 2 % by norm. The roofline is the matrix products of the projections alone at the speed of a
large bf16 product of this process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from arguments import lacks_gpu, output_of, parser_of
from fla_pinned import without_our_kernels
from torch import Tensor

from jet_export.bench import timer
from jet_export.kernels.jet_block_backward import Block, Dims, backward_torch, forward_torch
from jet_export.kernels.jet_block_train import jet_block_train
from jet_export.kernels.linear_kl import linear_kl
from jet_export.utils.environment import write_result

DEVICE = "cuda"
MODELS = {"2b": (1536, 12, 96, 256), "4b": (2048, 16, 128, 256)}  # hidden, H, K, V
W, REDUCTION, EPS, VOCABULARY = 4, 8, 1e-5, 151936
WORST = 0.02


class PlainBlock(torch.autograd.Function):
    """The block in plain torch, both passes, its inputs saved as jet_block_train saves them."""

    @staticmethod
    def forward(ctx: Any, dims: Dims, cu_seqlens: Tensor, *tensors: Tensor) -> Tensor:
        ctx.dims, ctx.cu_seqlens = dims, cu_seqlens
        ctx.save_for_backward(*tensors)
        inputs: Any = (*tensors, cu_seqlens, None, dims, EPS)
        return forward_torch(Block(*inputs))[0]

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> Any:
        block = Block(*[*ctx.saved_tensors, ctx.cu_seqlens, None, ctx.dims, EPS])
        return None, None, *backward_torch(block, douts[0], None)[:6]


class JetLayer(torch.nn.Module):
    """The layer's weights at the scale of an initialisation, and its training pass."""

    def __init__(self, model: str) -> None:
        super().__init__()
        hidden, H, K, V = MODELS[model]
        self.dims = Dims(H, K, V)
        D = H * V

        def weight(rows: int, columns: int) -> torch.nn.Parameter:
            return torch.nn.Parameter((torch.randn(rows, columns, device=DEVICE) * columns**-0.5).bfloat16())

        self.qkuz, self.ba, self.out = weight(self.dims.width, hidden), weight(2 * H, hidden), weight(hidden, D)
        self.w1, self.w2 = weight(D // REDUCTION, hidden), weight(D * W, D // REDUCTION)
        self.A_log = torch.nn.Parameter(torch.empty(H, device=DEVICE).uniform_(1, 16).log())
        self.dt_bias = torch.nn.Parameter(torch.empty(H, device=DEVICE).uniform_(-6.9, -2.3))
        self.w_o = torch.nn.Parameter(torch.ones(V, device=DEVICE, dtype=torch.bfloat16))

    def block_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        kappa = F.linear(F.silu(F.linear(x, self.w1)), self.w2)
        return F.linear(x, self.qkuz), F.linear(x, self.ba), kappa, self.A_log, self.dt_bias, self.w_o

    def forward(self, x: Tensor, cu_seqlens: Tensor, plain: bool = False) -> Tensor:
        dims, inputs = self.dims, self.block_inputs(x)
        if plain:
            y = PlainBlock.apply(dims, cu_seqlens, *inputs)
        else:
            args: Any = (*inputs, cu_seqlens, dims.H, dims.K, dims.V, EPS)
            y = jet_block_train(*args)
        return F.linear(y, self.out)


def bounds(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens], device=DEVICE).cumsum(0).int()


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def layer_errors(model: str) -> dict[str, float]:
    """Of the block's result and gradients in bf16, against fp64, on 500 tokens in three sequences."""
    layer = JetLayer(model)
    cu, dims = bounds([1, 333, 166]), layer.dims
    inputs = [
        x.detach().requires_grad_()
        for x in layer.block_inputs(torch.randn(500, len(layer.out), device=DEVICE).bfloat16())
    ]
    args: Any = (*inputs, cu, dims.H, dims.K, dims.V, EPS)
    out: Any = jet_block_train(*args)
    dout = torch.randn_like(out)
    exact: Any = [x.detach().double() for x in inputs]
    block = Block(*[*exact, cu, None, dims, EPS])
    names = ("qkuz", "ba", "kappa", "A_log", "dt_bias", "w_o")
    pairs = zip(names, torch.autograd.grad(out, inputs, dout), backward_torch(block, dout.double(), None), strict=False)
    return {"out": error(out, forward_torch(block)[0])} | {f"d{name}": error(a, b) for name, a, b in pairs}


def backward_of(forward: Callable[[], Tensor], weights: list[Tensor]) -> Callable[[], Any]:
    """One forward and backward pass; the gradients are returned and not accumulated."""

    def run() -> Any:
        out = forward()
        return torch.autograd.grad(out, weights, out.detach())

    return run


def fla_layer(model: str, x: Tensor) -> tuple[Callable[[], Any] | None, str]:
    """A pass of FLA's layer of the same heads on x [B, T, hidden], autotuned by FLA; or None and why there is none."""
    hidden, H, K, V = MODELS[model]
    try:
        with without_our_kernels():
            from fla.layers import GatedDeltaNet
        layer = GatedDeltaNet(hidden_size=hidden, head_dim=K, num_heads=H, expand_v=V / K).to(DEVICE).bfloat16()
        run = backward_of(lambda: layer(x)[0], [x, *layer.parameters()])
        run()
        torch.cuda.synchronize()
    except Exception as e:  # whatever stops it is what is reported
        return None, f"{type(e).__name__}: {e}"
    return run, ""


def peak_memory(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows_of(variants: dict[str, Callable[[], Any]], tokens: int, repeats: int = 15) -> dict[str, dict[str, float]]:
    rows = {}
    for name, t in timer.compare(variants, repeats=repeats, device=DEVICE).items():
        speed, memory = 1e3 * tokens / t.median, peak_memory(variants[name])
        rows[name] = {"ms": t.median, "p90": t.p90, "tokens_per_s": speed, "peak_bytes": memory}
    return rows


def layer_speed(model: str, tokens: int, sequences: int, flops: float, with_fla: bool) -> dict[str, Any]:
    layer = JetLayer(model)
    x = torch.randn(tokens, len(layer.out), device=DEVICE).bfloat16().requires_grad_()
    cu = bounds([tokens // sequences] * sequences)
    weights = [x, *layer.parameters()]
    variants: dict[str, Callable[[], Any]] = {
        "jet": backward_of(partial(layer, x, cu), weights),
        "plain torch": backward_of(partial(layer, x, cu, True), weights),
    }
    batch = x.detach().view(sequences, -1, x.shape[1]).requires_grad_()
    fla, why_not = fla_layer(model, batch) if with_fla else (None, "not asked for")
    if fla is not None:
        variants["fla"] = fla
    products = sum(w.numel() for w in layer.parameters() if w.dim() == 2)
    return {
        "model": model,
        "tokens": tokens,
        "sequences": sequences,
        "roofline_ms": 1e3 * 6 * tokens * products / flops,
        "fla": why_not or "ran",
        "kernels_ms": timer.kernel_times(variants["jet"]),
        "rows": rows_of(variants, tokens),
    }


def plain_loss(x: Tensor, w: Tensor, x_teacher: Tensor, w_teacher: Tensor, labels: Tensor) -> Tensor:
    z, teacher = F.linear(x, w).float(), F.linear(x_teacher, w_teacher).float()
    kl = F.kl_div(z.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    return kl + F.cross_entropy(z, labels)


def loss_speed(model: str, tokens: int) -> dict[str, Any]:
    hidden = MODELS[model][0]
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16().requires_grad_()
    w, w_teacher = ((torch.randn(VOCABULARY, hidden, device=DEVICE) * 0.02).bfloat16() for _ in range(2))
    labels = torch.randint(0, VOCABULARY, (tokens,), device=DEVICE)
    args = (x, w, x.detach(), w_teacher, labels)
    ours = lambda: linear_kl(*args, kl_weight=1.0, ce_weight=1.0)[0]  # noqa: E731
    plain = lambda: plain_loss(*args)  # noqa: E731
    (a,), (b,) = (torch.autograd.grad(f(), x) for f in (ours, plain))
    errors = {"loss": error(ours(), plain()), "dx": error(a, b)}
    variants = {"linear_kl": backward_of(ours, [x]), "plain torch": backward_of(plain, [x])}
    return {"model": model, "tokens": tokens, "errors": errors, "rows": rows_of(variants, tokens, repeats=8)}


def main() -> int:
    parser = parser_of(__doc__, "train_layer")
    parser.add_argument("--models", default="2b")
    parser.add_argument("--parts", default="layer,loss")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--fla", action=argparse.BooleanOptionalAction, default=True, help="its autotuning takes minutes"
    )
    options = parser.parse_args()
    if lacks_gpu("train_layer.py"):
        return 2
    torch.manual_seed(0)
    models, parts = options.models.split(","), options.parts.split(",")
    result: dict[str, Any] = {"errors": {}, "layers": [], "losses": []}
    for model in models:
        result["errors"][model] = layer_errors(model)
        print(f"{model}: " + ", ".join(f"{n} {e:.2e}" for n, e in result["errors"][model].items()), flush=True)
    if not all(e < WORST for errors in result["errors"].values() for e in errors.values()):
        print("The gradients are wrong: no figures.", file=sys.stderr)
        return 1
    result["matmul_flops"] = flops = timer.matmul_speed(torch.bfloat16)
    for model in models:
        for sequences in (1, 4) if "layer" in parts else ():
            result["layers"].append(row := layer_speed(model, options.tokens, sequences, flops, options.fla))
            show(f"layer {model}, {sequences} x {options.tokens // sequences} (fla: {row['fla']})", row)
            write_result(output_of(options), result)
        if "loss" in parts:
            result["losses"].append(row := loss_speed(model, options.tokens))
            show(f"loss {model}", row)
            write_result(output_of(options), result)
    return 0


def show(title: str, row: dict[str, Any]) -> None:
    print(title)
    for name, r in row["rows"].items():
        print(
            f"  {name}: {r['ms']:.3f} ms, {r['tokens_per_s']:,.0f} tokens/s, {r['peak_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
