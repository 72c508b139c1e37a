"""Speed of every kernel on this GPU in one table, beside FLA, SGLang's JetBlock, SDPA's flash attention and FlashInfer
where installed.

    python benchmarks/kernels/kernels.py [--models 2b,4b] [--parts block,attention,sglang] [--output FILE]

Correctness comes first, and without it there are no figures. Prefill is timed per call, decode per layer in a CUDA
graph that walks through several layers' states, so that they do not stay in L2. The roofline is the slower of moving
the bytes that must be moved at copy speed and computing at the speed of a large bf16 product, both of this process.
FLA's figures are its delta rule alone: no convolution, SiLU, normalisation of q and k, gates or gated norm; flash
attention and FlashInfer get roped queries and a filled cache. SGLang's is its JetBlock between the projections, by its
own code (sglang_path.py): prefill call by call, as it waits for the GPU in between, decode in a CUDA graph. Sweeps of
attention: kernels_attention.py; of all: tune.py. JSON and a picture are written after every case.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import kernels_attention as attention
import torch
from arguments import lacks_gpu, output_of, parser_of
from block_cases import DECODE, MODELS, PREFILL, block_inputs, correctness, decode_work, prefill_work, rel, rule_work
from fla_pinned import import_fla, rule_inputs
from kernels_table import KernelRow, measured_peaks, report, row, to_dicts
from sglang_path import import_sglang, jet_block_path
from torch import Tensor

from jet_export.bench import timer
from jet_export.kernels.attention import rope_ref
from jet_export.kernels.form import Form
from jet_export.kernels.state_layout import NO_BUFFER
from jet_export.utils.environment import write_result


def block_prefill(model: str, fla: Any, peaks: tuple[float, float]) -> list[KernelRow]:
    """jet_block and its parts, each beside its own roofline."""
    H, K, V, *_ = MODELS[model]
    D, out, ops = H * V, list[KernelRow](), torch.ops.jet
    for B, T in PREFILL:
        args = block_inputs([T] * B, model)
        q, k, v, beta, g = rule_inputs(B, T, H, K, V)
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1).bfloat16() for x in (q, k))
        packed, state = [x.flatten(0, 1) for x in (q, k, v, beta, g)], args[7].clone()
        u, kappa, conv_state = args[0][:, 2 * H * K : 2 * H * K + D], args[2], args[6]
        gate = args[0][:, 2 * H * K + D : 2 * H * K + 2 * D].unflatten(1, (H, V))
        variants: dict[str, Callable[[], Any]] = {
            "jet_block": partial(ops.jet_block, *args, Form.PREFILL, *NO_BUFFER, None),
            "gated_delta_rule": partial(ops.gated_delta_rule, *packed, state, *args[8:11], Form.PREFILL, *NO_BUFFER),
            "dynamic_conv": partial(ops.dynamic_conv, u, kappa, conv_state, *args[8:11]),
            "gated_rms_norm": partial(ops.gated_rms_norm, packed[2], args[5], gate, 1e-5),
        }
        if fla is not None:
            variants["fla"] = partial(
                fla.chunk_gated_delta_rule, q, k, v, g, beta, initial_state=state, output_final_state=True
            )
        times = timer.compare(variants, graph=True, repeats=15)
        n = B * T
        work = {  # bytes read and written, FLOPs
            "jet_block": prefill_work(n, model),
            "gated_delta_rule": rule_work(n, model),
            "dynamic_conv": (n * 2 * 6 * D, 0),
            "gated_rms_norm": (n * 2 * 3 * D, 0),
        }
        split = ", ".join(f"{name} {ms:.3f}" for name, ms in timer.kernel_times(variants["jet_block"]).items())
        for name, t in times.items():
            case = (model, f"B{B} T{T}", "bf16, state fp32")
            if name == "fla":
                nothing = (0.0, 0.0, *peaks)
                for ours in ("jet_block", "gated_delta_rule"):
                    out.append(row(ours, *case, "fla 0.6.0", t, *nothing, "its delta rule alone", same_work=False))
            else:
                note = split if name == "jet_block" else ""
                out.append(row(name, *case, "jet", t, *work[name], *peaks, note))
    return out


def block_decode(model: str, fla: Any, peaks: tuple[float, float]) -> list[KernelRow]:
    H, K, V, *_ = MODELS[model]
    out = []
    for B in DECODE:
        for dtype in (torch.float32, torch.bfloat16):
            moved, layers = decode_work(B, model, dtype)
            sets = [block_inputs([1] * B, model, dtype, context=4) for _ in range(layers)]
            variants = {
                "jet": attention.in_turn([partial(torch.ops.jet.jet_block, *a, True, *NO_BUFFER, None) for a in sets])
            }
            if fla is not None and dtype == torch.float32:
                q, k, v, beta, g = rule_inputs(B, 1, H, K, V)
                rule = partial(
                    fla.fused_recurrent_gated_delta_rule,
                    q,
                    k,
                    v,
                    g=g,
                    beta=beta,
                    output_final_state=True,
                    use_qk_l2norm_in_kernel=True,
                )
                variants["fla 0.6.0"] = attention.in_turn([partial(rule, initial_state=a[7]) for a in sets])
            times = timer.compare(variants, graph=True, repeats=15, calls=layers)
            for name, t in times.items():
                note = "" if name == "jet" else "its delta rule alone"
                state = "fp32" if dtype == torch.float32 else "bf16"
                case = ("jet_block decode", model, f"B{B}", f"bf16, state {state}", name)
                out.append(row(*case, t, moved, 0, *peaks, note))
    return out


def sglang_block(model: str, sglang: Any, peaks: tuple[float, float]) -> list[KernelRow]:
    """jet_block beside SGLang's JetBlock, prefill and decode, state in fp32. Where their results differ by over 2 % (it
    rounds to bf16 after every step) there is a note instead of its time."""
    out: list[KernelRow] = []
    cases = [("jet_block", f"B{B} T{T}", [T] * B) for B, T in PREFILL]
    cases += [("jet_block decode", f"B{B}", [1] * B) for B in DECODE]
    for kernel, shape, lens in cases:
        decode, work, layers = kernel.endswith("decode"), prefill_work(sum(lens), model), 1
        if decode:
            moved, layers = decode_work(len(lens), model, torch.float32)
            work = moved, 0
        sets = [block_inputs(lens, model, context=4 if decode else 0) for _ in range(layers)]
        runs = [jet_block_path(sglang, a, decode)[0] for a in sets]
        difference = rel(runs[0](), torch.ops.jet.jet_block(*sets[0], decode, *NO_BUFFER, None).double())
        variants = {
            "jet": attention.in_turn([partial(torch.ops.jet.jet_block, *a, decode, *NO_BUFFER, None) for a in sets])
        }
        times = timer.compare(variants, graph=True, repeats=15, calls=layers)
        note = f"sglang: its result differs by {difference:.1e}"
        if difference < 2e-2:
            name, note = f"sglang {sglang.version}", ""
            theirs = {name: attention.in_turn(runs)}
            times |= timer.compare(theirs, graph=decode, repeats=5, warmup=1, calls=layers)
        for name, t in times.items():
            out.append(row(kernel, model, shape, "bf16, state fp32", name, t, *work, *peaks, note))
    return out


def attention_prefill(model: str, peaks: tuple[float, float]) -> list[KernelRow]:
    heads, out = attention.HEADS[model], []
    for B, T, context in attention.PREFILL:
        args = attention.make(B, T, context, heads)
        attention.prefill(args)  # appends, so that flash sees the same keys
        flash, _ = attention.flash(args, T, context)
        fp8 = [*args[:2], args[2].to(attention.FP8), *args[3:]]
        variants = {
            ("bf16", "jet"): partial(attention.prefill, args),
            ("bf16", "sdpa flash"): flash,
            ("bf16, cache fp8", "jet"): partial(attention.prefill, fp8),
        }
        flops = 4 * attention.DH * heads[0] * B * (T * context + T * (T + 1) // 2)
        keys = 2 * heads[1] * attention.DH * B * (context + T)
        times = timer.compare({str(name): fn for name, fn in variants.items()}, repeats=15, graph=True)
        for dtypes, name in variants:
            nbytes = keys * (1 if "fp8" in dtypes else 2) + 4 * B * T * heads[0] * attention.DH
            case = ("attention prefill", model, f"B{B} T{T}+{context}", dtypes, name)
            out.append(row(*case, times[str((dtypes, name))], nbytes, flops, *peaks))
    return out


def attention_decode(model: str, peaks: tuple[float, float]) -> list[KernelRow]:
    heads, out = attention.HEADS[model], []
    cases = [(b, n, 0) for n in (4096, 65536) for b in (1, 64, 128)] + [(1, 262144, 0), (32, 262144, 0)]
    cases += [(64, 65536, w) for w in (1152, 2048)]
    for cache in (attention.BF16, attention.FP8):
        pool = attention.random_cache(66560, heads[1], cache)
        for B, context, window in cases:
            if B * (context // attention.PAGE + 1) > pool.shape[0]:
                continue
            size = B * min(context, window or context) * 2 * heads[1] * attention.DH * cache.itemsize
            calls = max(1, min(20, int(4e8 / size), pool.shape[0] // (B * (context // attention.PAGE + 1))))
            sets = [attention.make(B, 1, context - 1, heads, cache=pool) for _ in range(calls)]
            variants = {"jet": attention.in_turn([partial(attention.decode, a, window) for a in sets])}
            note = ""
            try:
                runs = [flashinfer_decode(a) for a in sets] if not window else []
                if runs:
                    timer.capture(runs[0])
                    variants["flashinfer"] = attention.in_turn(runs)
            except ImportError:
                pass  # said by main
            except Exception as e:
                note = f"flashinfer: {type(e).__name__}: {str(e)[:60]}"
            shape = f"B{B} {context}" + (f" window {window}" if window else "")
            for name, t in timer.compare(variants, repeats=15, graph=True, calls=calls).items():
                dtypes = f"bf16, cache {attention.NAMES[cache]}"
                case = ("attention decode", model, shape, dtypes, name)
                out.append(row(*case, t, size, 0, *peaks, note if name == "jet" else ""))
        del pool
    return out


def flashinfer_decode(args: list) -> Callable[[], Tensor]:
    """FlashInfer's paged decode over the same cache (its HND layout is ours), after our append. Raises where it is not
    installed, does not take these sizes, or gives another result than ours (1 %)."""
    import flashinfer

    want = attention.decode(args)  # appends the new key
    qkv, cos_sin, cache, block_table, _, _, context_lens, Hq, Hkv, Dh = args
    lens = context_lens + 1
    pages = (lens + attention.PAGE - 1) // attention.PAGE
    indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    indices = torch.cat([block_table[i, :n] for i, n in enumerate(pages.tolist())])
    q = rope_ref(qkv.view(len(lens), -1, Dh)[:, :Hq], cos_sin[context_lens.long()]).contiguous()
    workspace = torch.empty(2**28, dtype=torch.uint8, device=qkv.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    last = (lens - 1) % attention.PAGE + 1
    wrapper.plan(
        indptr, indices, last.int(), Hq, Hkv, Dh, attention.PAGE, q_data_type=q.dtype, kv_data_type=cache.dtype
    )
    difference = rel(wrapper.run(q, cache).flatten(1), want.double())
    if not difference < 1e-2:
        raise ValueError(f"its result differs by {difference:.1e}")
    return lambda: wrapper.run(q, cache)


def main() -> int:
    parser = parser_of(__doc__, "kernels")
    parser.add_argument("--models", default="2b,4b")
    parser.add_argument("--parts", default="block,attention,sglang")
    options = parser.parse_args()
    if lacks_gpu("kernels.py"):
        return 2
    output = output_of(options)
    torch.manual_seed(0)
    models, parts = options.models.split(","), options.parts.split(",")
    result: dict[str, Any] = {
        "errors": {model: correctness(model) for model in models if {"block", "sglang"} & set(parts)}
    }
    checks = [attention.check(*c) for c in attention.CHECKS] if "attention" in parts else []
    result["attention_checks"] = checks
    right = all(e < 1e-2 for errors in result["errors"].values() for e in errors.values())
    if not (right and all(c["ok"] for c in checks)):
        print(f"wrong results: no speed to report: {result}", file=sys.stderr)
        return 1
    fla = import_fla() if "block" in parts else None
    sglang = import_sglang() if "sglang" in parts else None
    if "attention" in parts and importlib.util.find_spec("flashinfer") is None:
        print("FlashInfer is not compared with: it is not installed")
    peaks = measured_peaks(result)
    rows: list[KernelRow] = []
    for model in models:
        steps: list[Callable[[], list[KernelRow]]] = []
        if "block" in parts:
            steps += [partial(block_prefill, model, fla, peaks), partial(block_decode, model, fla, peaks)]
        if sglang is not None:
            steps.append(partial(sglang_block, model, sglang, peaks))
        if "attention" in parts:
            steps += [partial(attention_prefill, model, peaks), partial(attention_decode, model, peaks)]
        for step in steps:
            rows += step()
            write_result(output, {**result, "rows": to_dicts(rows)})
            torch.cuda.empty_cache()
    report(output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
