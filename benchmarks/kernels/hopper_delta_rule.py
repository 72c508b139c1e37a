"""The Hopper form of the gated delta rule's prefill beside the portable one: errors against fp64, then speed.

    python benchmarks/kernels/hopper_delta_rule.py --check          # tiny cases only: does it hang, is it right?
    python benchmarks/kernels/hopper_delta_rule.py [--output FILE]

Every case runs in a process of its own, which is ended if it takes too long: a wrong barrier hangs the kernel. The
tiny cases come first, and nothing is timed unless they pass. All forms run over the same inputs in one process, states
fp32; a case is red if a Hopper form's error exceeds 1.1 times the portable one's, and shows no speed. JSON is written
after every case.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from arguments import lacks_gpu, output_of, parser_of

TIMEOUT = 120  # seconds: a compilation takes 15, the longest case's fp64 reference a few more
FORMS = ("wide", "narrow")


class Case(NamedTuple):
    model: str
    lens: list[int]

    @property
    def name(self) -> str:
        return f"{self.model}:{','.join(map(str, self.lens))}"

    @property
    def shape(self) -> str:
        return f"B{len(self.lens)} T{self.lens[0]}"


MODELS = ("qwen3.5-4b", "4b")  # H 32, 16 key heads, V 128; H 16, V 256; K 128
TINY = [Case(model, lens) for model in MODELS for lens in ([64], [1, 65, 300])]
CASES = [Case(model, [T] * B) for model in MODELS for B, T in ((1, 2048), (16, 2048), (8, 8192), (1, 65536))]


def measure(model: str, lens: list[int], timed: bool) -> dict[str, Any]:
    """Errors of o and the states of each variant, and ms a call, median and p90."""
    import torch
    from block_cases import MODELS, block_inputs, rel

    from jet_export.bench import timer
    from jet_export.kernels.form import Form
    from jet_export.kernels.gated_delta_rule import packed_gated_delta_rule_ref
    from jet_export.kernels.gated_delta_rule_chunk import chunk_delta_rule_triton
    from jet_export.kernels.hopper_gated_delta_rule import NARROW, WIDE, hopper_delta_rule

    torch.manual_seed(0)
    H, K, V, HK, _ = MODELS[model]
    qkuz, ba, _, A_log, dt_bias, _, _, pool, *sequences, _, _, _, _ = block_inputs(lens, model, context=4)
    q, k, v = (x.contiguous() for x in qkuz[:, : 2 * HK * K + H * V].split([HK * K, HK * K, H * V], -1))
    q, k, v = q.unflatten(-1, (HK, K)), k.unflatten(-1, (HK, K)), v.unflatten(-1, (H, V))
    b, a = ba.split(H, -1)
    beta, g = b.sigmoid(), -A_log.exp() * torch.nn.functional.softplus(a.float() + dt_bias)
    inputs = q, k, v, beta, g
    rules: dict[str, Callable[..., Any]] = {
        "portable": chunk_delta_rule_triton,
        "wide": partial(hopper_delta_rule, form=WIDE),
        "narrow": partial(hopper_delta_rule, form=NARROW),
    }
    exact: list[Any] = [x.double() for x in (*inputs, pool)]
    exact += [*sequences, Form.PREFILL]
    want = packed_gated_delta_rule_ref(*exact)
    errors: dict[str, tuple[float, float]] = {}
    variants: dict[str, Callable[[], Any]] = {}
    for name, rule in rules.items():
        state = pool.clone()
        o = rule(*inputs, state, *sequences, (H, K, V), key_heads=HK)
        errors[name] = rel(o, want), rel(state, exact[5])
        variants[name] = partial(rule, *inputs, pool.clone(), *sequences, (H, K, V), key_heads=HK)
    del want, exact, o
    times = timer.compare(variants, repeats=15, graph=True) if timed and not red(errors) else {}
    return {"errors": errors, "ms": {name: (t.median, t.p90) for name, t in times.items()}}


def red(errors: dict[str, Any]) -> list[str]:
    """The forms whose error is not that of the portable one; NaN is red."""
    return [f for f in FORMS if not all(e <= 1.1 * p for e, p in zip(errors[f], errors["portable"], strict=True))]


def apart(case: Case, timed: bool, limit: float = TIMEOUT) -> dict[str, Any]:
    """What a process of its own measures. {"failed": why} if it hangs or dies."""
    command = [sys.executable, __file__, "--case", case.name, *(["--timed"] if timed else [])]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"hung: ended after {limit:.0f} s"}
    if result.returncode != 0:
        return {"failed": (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]}
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    if forms := red(measured["errors"]):
        measured["failed"] = f"{' and '.join(forms)}: errors of o and states {measured['errors']}"
    return measured


def said(case: Case, measured: dict[str, Any]) -> bool:
    """Prints a line; whether the case passed."""
    what = measured.get("failed") or f"errors {measured['errors']}, ms {measured['ms']}"
    print(f"{case.model} {case.lens if case in TINY else case.shape}: {what}", flush=True)
    return "failed" not in measured


def main() -> int:
    parser = parser_of(__doc__, "hopper_delta_rule")
    parser.add_argument("--check", action="store_true", help="the tiny cases, untimed, and nothing else")
    parser.add_argument("--case", help="MODEL:T,T,... in this process, as JSON: what the others start")
    parser.add_argument("--timed", action="store_true", help="with --case: its speed too")
    options = parser.parse_args()
    if lacks_gpu("hopper_delta_rule.py"):
        return 2
    if options.case:
        model, _, lens = options.case.partition(":")
        print(json.dumps(measure(model, [int(n) for n in lens.split(",")], options.timed)))
        return 0
    if not all([said(case, apart(case, timed=False)) for case in TINY]):
        print("the tiny cases failed: nothing is timed", file=sys.stderr)
        return 1
    return 0 if options.check else table(options)


def table(options: Any) -> int:
    from block_cases import rule_work
    from kernels_table import KernelRow, measured_peaks, report, row, to_dicts

    from jet_export.bench.timer import Timing
    from jet_export.utils.environment import write_result

    output, rows = output_of(options), list[KernelRow]()
    result: dict[str, Any] = {"cases": {}}
    peaks = measured_peaks(result)
    for case in CASES:
        measured = result["cases"][case.name] = apart(case, timed=True)
        said(case, measured)
        work = rule_work(sum(case.lens), case.model)
        for name, ms in measured.get("ms", {}).items():
            where = (case.model, case.shape, "bf16, state fp32")
            note = "errors {:.1e}, {:.1e}".format(*measured["errors"][name])
            rows.append(row("gated_delta_rule", *where, f"jet {name}", Timing(*ms), *work, *peaks, note))
        write_result(output, {**result, "rows": to_dicts(rows)})
    report(output, rows)
    return 0 if all("failed" not in m for m in result["cases"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
