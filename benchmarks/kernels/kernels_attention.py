"""Speed of jet::attention on this GPU: prefill against SDPA's flash attention, decode against the copy speed.

    python benchmarks/kernels/kernels_attention.py            # correctness, both tables, a JSON
    python benchmarks/kernels/kernels_attention.py --sweep    # the lists of tile configurations below as well

Prefill times the whole op (RoPE, append to the paged cache, attention) beside flash attention of contiguous, already
roped q, k, v in the same process. Decode times a CUDA graph of calls on different parts of a cache far larger than L2
and divides the key and value bytes that must be read by the time.
"""

import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from arguments import lacks_gpu, output_of, parser_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jet_export.bench import timer
from jet_export.kernels.attention import attention_ref, rope_ref
from jet_export.kernels.attention_decode import DecodeConfig, attention_decode_triton
from jet_export.kernels.attention_prefill import PrefillConfig, attention_prefill_triton
from jet_export.utils.environment import write_result

BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
NAMES = {BF16: "bf16", FP32: "fp32", FP8: "fp8"}
PAGE, DH = 128, 128
DEVICE = "cuda"
HEADS = {"2b": (12, 2), "4b": (16, 2)}
PREFILL = [(1, 16384, 0), (16, 2048, 0), (16, 2048, 14336)]  # batch, tokens a sequence, context
DECODE = [(b, n, 0, False) for n in (4096, 65536) for b in (1, 32, 64, 128)]  # batch, context, window, ragged
DECODE += [(64, 65536, 0, True)]  # contexts of every length up to this one
WINDOWS = [(b, 65536, w, False) for b in (1, 64) for w in (1152, 2048)]
PREFILL_SWEEP = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3), (128, 128, 8, 3)]
DECODE_SWEEP = [(128, 4, 2, 2), (128, 4, 2, 8), (128, 4, 3, 4), (64, 4, 3, 4), (64, 4, 4, 8), (64, 2, 3, 4)]


@functools.cache
def rope_table(positions: int, dtype: torch.dtype, rotary: int = DH) -> Tensor:
    angle = torch.arange(positions)[:, None] * 1e6 ** (-torch.arange(0, rotary, 2) / rotary)
    return torch.cat((angle.cos(), angle.sin()), 1).to(DEVICE, dtype)


def random_cache(pages: int, heads: int, dtype: torch.dtype, head_dim: int = DH) -> Tensor:
    cache = torch.empty(pages, 2, heads, PAGE, head_dim, dtype=dtype, device=DEVICE)
    for part in cache.split(4096):
        part.copy_(torch.randn(part.shape, dtype=BF16, device=DEVICE))
    return cache


def i32(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.int32).to(DEVICE)


def make(
    batch, tokens, context, heads, dtype=BF16, cache: Tensor | None = None, cache_dtype=BF16, head_dim=DH, rotary=0
) -> list:
    """Arguments of the op up to head_dim for equal sequences, pages in random order. `rotary`: dimensions of a head, by
    default all."""
    M = (context + tokens - 1) // PAGE + 1
    if cache is None:
        cache = random_cache(batch * M, heads[1], cache_dtype, head_dim)
    return [
        torch.randn(batch * tokens, (heads[0] + 2 * heads[1]) * head_dim, device=DEVICE).to(dtype),
        rope_table(context + tokens, dtype, rotary or head_dim),
        cache,
        i32(torch.randperm(cache.shape[0])[: batch * M].view(batch, M)),
        i32(torch.arange(batch + 1) * tokens),
        i32(torch.arange(batch)),
        i32(torch.full((batch,), context)),
        *heads,
        head_dim,
    ]


def prefill(args: list, window: int = 0, scale: float = 1.0, config: PrefillConfig | None = None) -> Tensor:
    launch: Callable[..., Tensor] = attention_prefill_triton
    return launch(*args, window, scale, scale, config=config)


def decode(args: list, window: int = 0, scale: float = 1.0, config: DecodeConfig | None = None) -> Tensor:
    launch: Callable[..., Tensor] = attention_decode_triton
    return launch(*args, window, scale, scale, config=config)


def in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """All of them, one after the other."""
    return lambda: [run() for run in runs]


# ---------------------------------------------------------------------------------------------------- correctness


CHECKS = [
    (kind, dtype, cache, heads, window)
    for kind in ("prefill", "decode")
    for dtype, cache in ((FP32, FP32), (BF16, BF16), (BF16, FP8))
    for heads, window in ((HEADS["2b"], 0), (HEADS["4b"], 0), (HEADS["2b"], 200))
]


def check(kind: str, dtype: torch.dtype, cache_dtype: torch.dtype, heads: tuple, window: int) -> dict:
    """Relative error of ragged sequences with one padding row against the fp32 CPU reference."""
    lens, context = [300, 1, 37, 2, 129], [0, 700, 64, 1, 383]
    if kind == "decode":
        lens, context = [1] * 5, [0, 700, 64, 300, 782]
    args = make(5, 400, 383, heads, dtype, cache_dtype=cache_dtype)
    args[0] = args[0][: sum(lens)]
    args[4], args[6] = i32(torch.tensor([0, *lens]).cumsum(0)), i32(context)
    args[5][2] = -1
    scale = 0.03 if cache_dtype == FP8 else 1.0
    cpu: list[Any] = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    reference: Callable[..., Tensor] = attention_ref
    expected = reference(*cpu, window, scale, scale).float()
    got = (decode if kind == "decode" else prefill)(args, window, scale).float().cpu()
    error = float((got - expected).norm() / expected.norm())
    stored = [c.view(torch.uint8) if c.dtype == FP8 else c for c in (args[2].cpu(), cpu[2])]
    differs = float((stored[0].double() - stored[1].double()).norm() / stored[1].double().norm())
    # fp32: rounding; 16 bits: p and o are rounded once, 2^-9 each at most. The cache is written with torch's roundings.
    bound = (1e-5, 1e-6) if dtype == FP32 else (2**-8, 0.0)
    case = f"{kind} {NAMES[dtype]} cache {NAMES[cache_dtype]} heads {heads} window {window}"
    return {"case": case, "error": error, "cache_error": differs, "ok": error <= bound[0] and differs <= bound[1]}


# ---------------------------------------------------------------------------------------------------- timing


def flash(args: list, tokens: int, context: int) -> Any:
    """Flash attention of the same numbers as contiguous q, k, v, causal to the end of the context."""
    Hq, Hkv = args[7:9]
    B, L = args[5].shape[0], context + tokens
    x = args[0].view(B, tokens, -1, DH)
    rows = args[1][context:L].repeat(B, 1)
    q = rope_ref(x[:, :, :Hq].flatten(0, 1), rows).view(B, tokens, Hq, DH)
    pages = args[3].long().flatten()
    kv = args[2][pages].view(B, -1, 2, Hkv, PAGE, DH).permute(2, 0, 1, 4, 3, 5).reshape(2, B, -1, Hkv, DH)[:, :, :L]
    k, v = (y.contiguous() for y in kv)
    if context == 0:
        q, k, v = (y.transpose(1, 2).contiguous() for y in (q, k, v))

        def run() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run, lambda o: o.transpose(1, 2).reshape(B * tokens, -1)

    def run_varlen() -> Tensor:  # the same kernel, causal from the bottom right, which SDPA does not offer
        return torch.ops.aten._flash_attention_forward(q, k, v, None, None, tokens, L, 0.0, True, False)[0]

    return run_varlen, lambda o: o.reshape(B * tokens, -1)


def bench_prefill(sweep: bool, runs: set) -> list[dict]:
    rows = []
    for model, heads in HEADS.items():
        for B, T, context in PREFILL:
            args = make(B, T, context, heads)
            flops = 4 * DH * heads[0] * B * (T * context + T * (T + 1) // 2)
            o = prefill(args)  # appends, so that flash sees the same keys
            run, packed = flash(args, T, context)
            error = float((packed(run()).float() - o.float()).norm() / o.float().norm())
            fns: dict[str, Callable[[], Any]] = {"sdpa flash": run, "jet::attention": partial(prefill, args)}
            for window in (1152, 2048) if model == "2b" and context else ():
                fns[f"jet::attention window {window}"] = partial(prefill, args, window)
            fp8 = [*args[:2], args[2].to(FP8), *args[3:]]
            fns["jet::attention fp8 cache"] = partial(prefill, fp8)
            for c in PREFILL_SWEEP if sweep and model == "2b" else ():
                for dtype, a in ((BF16, args), (FP8, fp8)):
                    if (dtype, c) in runs:
                        fns[f"{NAMES[dtype]} {c}"] = partial(prefill, a, config=PrefillConfig(*c))
            for name, t in timer.compare(fns, repeats=5 if sweep else 20, graph=True).items():
                rows.append(
                    {"model": model, "batch": B, "tokens": T, "context": context, "variant": name}
                    | {"ms": t.median, "p90_ms": t.p90}
                    | ({} if "window" in name else {"tflops": flops / t.median * 1e-9})
                    | {"difference_from_flash": error}
                )
            del args, fp8, fns, run, o
    return rows


def bench_decode(copy: float, sweep: bool, runs: set) -> list[dict]:
    rows = []
    for dtype in (BF16, FP8):
        pool = random_cache(66560, 2, dtype)  # 64K tokens of 128 sequences; 8.7 GB in bf16
        for model, heads in HEADS.items():
            for B, context, window, ragged in DECODE + (WINDOWS if model == "2b" else []):
                lens = torch.linspace(1, context, B).long()[torch.randperm(B)] if ragged else torch.full((B,), context)
                size = int(lens.clamp(max=window or context).sum()) * 2 * heads[1] * DH * pool.element_size()
                calls = max(1, min(20, int(4e8 / size), pool.shape[0] // (B * (context // PAGE + 1))))
                sets = [make(B, 1, context - 1, heads, cache=pool) for _ in range(calls)]
                for args in sets:
                    args[6] = i32(lens - 1)
                configs: dict[str, DecodeConfig | None] = {"jet::attention": None}
                if sweep and model == "2b" and not window:
                    configs |= {f"{c}": DecodeConfig(*c) for c in DECODE_SWEEP if (dtype, c) in runs}
                fns = {name: in_turn([partial(decode, s, window, 1.0, c) for s in sets]) for name, c in configs.items()}
                for name, t in timer.compare(fns, repeats=8 if sweep else 20, graph=True, calls=calls).items():
                    speed = size / t.median * 1e3
                    rows.append(
                        {
                            "model": model,
                            "cache": NAMES[dtype],
                            "batch": B,
                            "context": context,
                            "window": window,
                            "ragged": ragged,
                        }
                        | {"variant": name, "us": t.median * 1e3, "p90_us": t.p90 * 1e3}
                        | {"kv_gb_s": speed / 1e9, "of_copy": speed / copy}
                    )
                del sets, fns
        del pool
    return rows


# ---------------------------------------------------------------------------------------------------- main


def compile_one(job: tuple) -> bool:
    """Fill Triton's cache for one configuration (see `precompile`); whether it runs on this GPU."""
    kind, dtype, cache_dtype, heads, window, config = job
    args = make(2, 1, 1, heads, dtype, cache_dtype=cache_dtype)
    try:
        (decode if kind == "decode" else prefill)(args, window, 1.0, config)
        torch.cuda.synchronize()
    except Exception as error:
        print("does not run:", *job, repr(error)[:200], flush=True)
        return False
    return True


def precompile(sweep: bool) -> set:
    """Compile what will run in several processes, as one would take minutes; the (cache, configuration) that run."""
    jobs: list[tuple] = [(*c, None) for c in CHECKS]
    for cache in (BF16, FP8):
        jobs += [(kind, BF16, cache, HEADS["2b"], w, None) for kind in ("prefill", "decode") for w in (1152, 2048)]
        if sweep:
            jobs += [("prefill", BF16, cache, HEADS["2b"], 0, PrefillConfig(*c)) for c in PREFILL_SWEEP]
            jobs += [("decode", BF16, cache, HEADS["2b"], 0, DecodeConfig(*c)) for c in DECODE_SWEEP]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        ok = pool.map(compile_one, jobs, chunksize=1)
    return {(job[2], tuple(job[5])) for job, good in zip(jobs, ok, strict=True) if good and job[5]}


def main() -> None:
    parser = parser_of(__doc__, "kernels_attention")
    parser.add_argument("--sweep", action="store_true", help="also time every configuration of the sweep lists")
    options = parser.parse_args()
    if lacks_gpu("kernels_attention.py"):
        sys.exit(2)
    output = output_of(options)
    torch.manual_seed(0)
    t = time.time()
    runs = precompile(options.sweep)
    print(f"compiled in {time.time() - t:.0f} s", flush=True)

    checks = [check(*c) for c in CHECKS]
    for c in checks:
        print(f"{c['case']:56} error {c['error']:.1e} cache {c['cache_error']:.1e} {'ok' if c['ok'] else 'WRONG'}")
    if not all(c["ok"] for c in checks):
        sys.exit("wrong results: no speed is measured")

    copy = timer.copy_speed()
    print(f"copy {copy / 1e12:.2f} TB/s, {time.time() - t:.0f} s", flush=True)
    result: dict[str, Any] = {"copy_tb_s": copy / 1e12, "checks": checks}
    result["prefill"] = bench_prefill(options.sweep, runs)
    write_result(output, result)
    for r in result["prefill"]:
        print(
            f"{r['model']} B{r['batch']} T{r['tokens']} +{r['context']:<6} {r['variant']:32} {r['ms']:8.3f} ms"
            f" {r.get('tflops', 0):6.0f} TFLOP/s  vs flash {r['difference_from_flash']:.1e}"
        )
    print(f"{time.time() - t:.0f} s", flush=True)
    result["decode"] = bench_decode(copy, options.sweep, runs)
    write_result(output, result)
    for r in result["decode"]:
        keys = "ragged" if r["ragged"] else f"window {r['window']}" if r["window"] else "all"
        print(
            f"{r['model']} {r['cache']} B{r['batch']:<4} {r['context']:<6} {keys:11} {r['variant']:18}"
            f" {r['us']:8.1f} us {r['kv_gb_s']:6.0f} GB/s {r['of_copy']:.2f}"
        )
    for B, context in ((1, 4096), (64, 65536)) if options.sweep else ():
        args = make(B, 1, context - 1, HEADS["2b"])
        print(B, context, timer.kernel_times(partial(decode, args)))
    print(f"{time.time() - t:.0f} s")


if __name__ == "__main__":
    main()
