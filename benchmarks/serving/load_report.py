"""The tables that a load test prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(result: dict[str, Any], slo: tuple[float, float]) -> None:
    columns = ("requests", "tokens/s", "of ideal", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99")

    def cells(r: dict[str, Any]) -> list[str]:
        if "ttft_ms" not in r:
            return ["all failed"]
        values = [r[k][p] for k in ("ttft_ms", "tpot_ms") for p in ("p50", "p95", "p99")]
        ideal = f"{r['ideal']['achieved']:.0%}" if "ideal" in r else "–"
        return [str(r["requests"]), f"{r['tokens_per_s']:.1f}", ideal, *(f"{v:.0f}" for v in values)]

    def table(first: tuple[str, ...], rows: list[list[str]], last: tuple[str, ...] = ()) -> None:
        out = Table(box=None, header_style="bold")
        for name in (*first, *columns, *last):
            out.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            out.add_row(*row)
        Console(width=160).print(out)

    rows = result["concurrency"] + result.get("deterministic", [])
    between = [", ".join(f"{v:g}" for v in r.get("inter_token_steps", {}).values()) for r in rows]
    first = [[str(r["concurrency"]), r["batching"], *cells(r)] for r in rows]
    table(("at once", "batching"), [[*r, b] for r, b in zip(first, between, strict=True)], ("steps between tokens",))
    print(f"Poisson arrivals; SLO: TTFT {slo[0]:g} ms, TPOT {slo[1]:g} ms")
    poisson = []
    for r in result["poisson"]:
        goodput = f"{r.get('goodput_requests_per_s', 0):.2f} ({r.get('within_slo', 0):.0%})"
        poisson.append([f"{r['load']:.0%}", f"{r['rate']:.2f}", *cells(r), goodput])
    table(("load", "requests/s"), poisson, ("goodput",))
    j = result["join"]
    before, joining = (f"p50 {j[k]['p50']:.0f}, p99 {j[k]['p99']:.0f} ms" for k in ("before_ms", "while_it_joins_ms"))
    print(f"{j['streams']} streams, gaps between tokens: {before}; while a prompt of {j['prompt_tokens']} tokens joins")
    print(f"(its TTFT {j['ttft_ms']:.0f} ms): {joining}")
