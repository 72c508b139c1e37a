"""What each part of the engine is worth: one model, one case after the other, in one table.

    python benchmarks/engine/ablation.py --model jet-2b [--cases 1:1024:1024,64:4096:2048] --output RESULTS.json

Rows: eager PyTorch, torch.compile, engine bf16, engine FP8, + FP8 KV cache, + bf16 state. The last only if bf16 passed
its gate (results/cpu/state_precision.json); otherwise it is listed as left out, with the reason. Eager and
torch.compile run without CUDA graphs, engines with them. Every row is verified first (jet-export verify's stages
against the eager model) and gives no figure where that fails. A case is batch:context:chunk, filled as
`jet-export bench` does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx.experimental import _config

from jet_export.backends.base import Engine
from jet_export.backends.eager import EagerEngine
from jet_export.backends.load import load_engine
from jet_export.bench.measure import Case, check_case, measure_engine
from jet_export.bench.references import references_of
from jet_export.bench.verified import require_verified
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import free_cached
from jet_export.bundle.target import target_device
from jet_export.kernels.form import Form
from jet_export.model.cache import PackedBatch
from jet_export.model.hub import load_config, resolve_checkpoint
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.utils.environment import write_result
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import check_file
from jet_export.verify.verify import verify_engines

fx_config: Any = _config  # its `patch` is added when it is imported

GATE = Path(__file__).parents[1] / "results/cpu/state_precision.json"
BUILDS = {
    "engine bf16": [],
    "engine FP8": ["--fp8"],
    "+ FP8 KV cache": ["--fp8", "--kv-cache-dtype", "fp8"],
    "+ bf16 state": ["--fp8", "--kv-cache-dtype", "fp8", "--state-dtype", "bfloat16"],
}
ROWS = ("eager PyTorch", "torch.compile", *BUILDS)


# Without them torch.compile makes six graphs of this model, some minutes each: sizes of 1, and sizes that happen to be
# equal at the first call, get graphs of their own.
ONE_GRAPH = {"backed_size_oblivious": True, "use_duck_shape": False}


class CompiledEngine(EagerEngine):
    """The eager model under torch.compile: a dynamic graph for prefill, and one for decode, of any batch.

    jet-2b at B128 64K makes one graph more (NOTES.md).
    """

    def __init__(self, eager: EagerEngine, phases: str = "all") -> None:
        super().__init__(eager.model, eager.limits, kv_dtype=eager.dtype, state_dtype=torch.float32)
        self.forward = torch.compile(eager.model.forward_packed, dynamic=True)
        self.compiles_prefill = phases == "all"

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, batch: PackedBatch, logit_indices: Tensor, states: list[Tensor]) -> Tensor:
        if not self.compiles_prefill:
            return super().prefill(input_ids, batch, logit_indices, states)
        with fx_config.patch(ONE_GRAPH):
            return self.forward(input_ids, batch, states, logit_indices, Form.MIXED).logits

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, batch: PackedBatch, states: list[Tensor]) -> Tensor:
        with fx_config.patch(ONE_GRAPH):
            return self.forward(input_ids, batch, states, None, Form.DECODE).logits


@dataclass(frozen=True)
class Result:
    """tokens/s of a row by case; left_out: why there are none."""

    row: str
    decode: dict[str, float]
    prefill: dict[str, float]
    filled_by: dict[str, str]
    build_command: str = ""
    left_out: str = ""
    gated: bool = False  # left out as its gate says: not a failure


def parse_cases(text: str, new_tokens: int) -> list[Case]:
    """Raises JetExportError for what is not batch:context:chunk."""
    try:
        sizes = [tuple(int(n) for n in part.split(":")) for part in text.split(",")]
        return [
            Case(batch=batch, context=context, chunk=chunk, new_tokens=new_tokens) for batch, context, chunk in sizes
        ]
    except ValueError:
        raise JetExportError(
            f"--cases {text}: not a list of batch:context:chunk.", "For example: 1:1024:1024"
        ) from None


def gate_of(path: Path, state: str) -> str:
    """Why a state dtype may not be used for headline figures; empty where its gate passed."""
    try:
        passed = json.loads(path.read_text())["passed"]
    except (OSError, ValueError, KeyError):
        return f"{path.name} is missing: run benchmarks/kernels/state_precision.py"
    return "" if passed.get(state) else f"{state} failed its gate ({path.name})"


def eager_engine(model: str, limits: Limits, device: torch.device) -> EagerEngine:
    dtype = torch.bfloat16
    if model == "jet-tiny":
        net = JetNemotronForCausalLM.from_pretrained(resolve_checkpoint(model), dtype, device, limits.max_seq_len)
    else:
        net = random_model(load_config(model), dtype, device, max_positions=limits.max_seq_len)
    return EagerEngine(net, limits, kv_dtype=dtype, state_dtype=torch.float32)


def build(row: str, model: str, limits: Limits, directory: Path, device: str) -> tuple[Path, str]:
    """A row's bundle, built unless it is there; and the command."""
    path = directory / f"{model}-{row.replace('+ ', '').replace(' ', '-').lower()}"
    args = ["build", "--model", model, *BUILDS[row], "--backend", "inductor", "--device", device,
            "--max-batch-size", str(limits.max_batch_size), "--max-seq-len", str(limits.max_seq_len),
            "--prefill-chunk", str(limits.prefill_chunk), "--output", str(path)]  # fmt: skip
    args += ["--random-weights"] if model != "jet-tiny" else []
    subprocess.run([sys.executable, "-m", "jet_export.cli.app", *args], check=True)
    return path, shlex.join(["jet-export", *args])


def measure(engine: Engine, row: str, cases: list[Case], graphs: bool, fill_seconds: float, command: str) -> Result:
    decode, prefill, filled = {}, {}, {}
    for case in cases:
        name = f"B{case.batch} {case.context}"
        (m,) = measure_engine(engine, [case], fill_seconds=fill_seconds, cuda_graphs=graphs)
        decode[name], prefill[name], filled[name] = m.decode_tokens_per_s, m.prefill_tokens_per_s, m.filled_by
        print(f"{row}, {name}: decode {m.decode_tokens_per_s:,.1f} tokens/s", flush=True)
    return Result(row, decode, prefill, filled, command)


def run_row(row: str, args: argparse.Namespace, cases: list[Case], limits: Limits) -> Result:
    """Verify and measure one row."""
    device = target_device(args.device)
    reason = gate_of(GATE, "bfloat16") if row == "+ bf16 state" else ""
    if reason:
        return Result(row, {}, {}, {}, left_out=reason, gated=True)
    if row in BUILDS:
        bundle, command = build(row, args.model, limits, args.directory, device.type)
        require_verified(bundle, print)
        engine, _ = load_engine(bundle, check=False)
        return measure(engine, row, cases, True, args.fill_seconds, command)
    eager = eager_engine(args.model, limits, device)
    if row == "eager PyTorch":
        return measure(eager, row, cases, False, args.fill_seconds, "")
    compiled = CompiledEngine(eager, args.compile)
    red = [f for stage in verify_engines(compiled, eager) for f in stage.failures]
    if red:
        return Result(row, {}, {}, {}, left_out=f"verify fails: {red[0]}")
    result = measure(compiled, row, cases, False, args.fill_seconds, "")
    return result if compiled.compiles_prefill else replace(result, prefill={})  # it was the eager model's


def table(results: list[Result], cases: list[Case], model: str) -> Table:
    out = Table(box=None, header_style="bold")
    out.add_column("decode, tokens/s", no_wrap=True)
    names = [f"B{c.batch} {c.context}" for c in cases]
    for name in names:
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("")
    first = results[0].decode
    for r in results:
        cells = [
            f"{r.decode[n]:,.1f} ({r.decode[n] / first[n]:.2f}x)"
            if n in r.decode and n in first
            else f"{r.decode[n]:,.1f}"
            if n in r.decode
            else "–"
            for n in names
        ]
        out.add_row(r.row, *cells, r.left_out)
    for x in references_of(model):
        if x.kind == "decode" and f"B{x.batch} {x.context}" in names:
            out.add_row(x.source, *(f"{x.tokens_per_s:,.1f}" if n == f"B{x.batch} {x.context}" else "" for n in names))
    return out


def check(args: argparse.Namespace, cases: list[Case], limits: Limits) -> None:
    """Raises JetExportError for what no row could run with."""
    load_config(args.model)
    target_device(args.device)
    unknown = [r for r in args.rows.split(",") if r not in ROWS]
    if unknown:
        raise JetExportError(f"--rows {unknown[0]}: not known.", f"Known: {', '.join(ROWS)}.")
    if args.new_tokens < 2:
        raise JetExportError(f"--new-tokens {args.new_tokens}: must be at least 2.")
    for case in cases:
        if min(case.batch, case.context, case.chunk) < 1:
            raise JetExportError(f"--cases {args.cases}: every number must be at least 1.")
        if reason := check_case(case, limits):
            raise JetExportError(f"--cases {args.cases}: {reason}.")
    check_file(args.output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="jet-2b")
    parser.add_argument("--cases", default="1:1024:1024,64:4096:2048,128:65536:2048")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-batch-size", type=int, help="of the bundles; default: what the cases need")
    parser.add_argument("--max-seq-len", type=int)
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument(
        "--compile",
        choices=("all", "decode"),
        default="all",
        help="the row torch.compile; decode: "
        "prefill stays eager, in half of the time, and no prefill figure is written",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--directory", type=Path, default=Path("bundles/ablation"))
    parser.add_argument("--fill-seconds", type=float, default=30.0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    cases = parse_cases(args.cases, args.new_tokens)
    limits = Limits(
        max_batch_size=args.max_batch_size or max(c.batch for c in cases),
        max_seq_len=args.max_seq_len or max(c.tokens for c in cases),
        prefill_chunk=args.prefill_chunk or max(c.chunk for c in cases),
    )
    check(args, cases, limits)
    results: list[Result] = []
    for row in args.rows.split(","):
        try:
            results.append(run_row(row, args, cases, limits))
        except (JetExportError, subprocess.CalledProcessError, RuntimeError) as e:  # out of memory is one
            results.append(Result(row, {}, {}, {}, left_out=str(e).splitlines()[0][:200]))
        found: dict[str, Any] = {
            "model": args.model,
            "command": shlex.join(["python", "benchmarks/engine/ablation.py", *sys.argv[1:]]),
        }
        write_result(args.output, {**found, "cases": [asdict(c) for c in cases], "rows": [asdict(r) for r in results]})
        free_cached(target_device(args.device))
    Console(width=170, highlight=False).print(table(results, cases, args.model))
    return 0 if all(r.decode or r.gated for r in results) else 1


def cli(run: Callable[[], int]) -> int:
    """Bad input: one message, exit status 2."""
    try:
        return run()
    except JetExportError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(main))
