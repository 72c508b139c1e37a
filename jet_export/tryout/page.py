"""The report as a Markdown page, to read and to share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jet_export.tryout.prompts import PROMPTS
from jet_export.utils.console import human

SHOWN = 60  # characters of a prompt


def page(report: dict[str, Any]) -> str:
    """What ran, what did not and why, and every figure with what it was measured on."""
    e = report["environment"]
    where = e["gpu"] if e["gpu"] != "none" else f"{e['cpu']} (no GPU)"
    parts = [
        f"# jet-export try: {report['model']} on {where}",
        f"torch {e['torch']}, CUDA {e['cuda']}, Triton {e['triton']}, driver {e['driver']}, Python {e['python']}; "
        f"{e['date']}, commit {e['commit']}.",
        f"```\n{report['command']}\n```",
        *_speed(report),
        *_logits(report),
        "## Steps",
        _table(
            ("step", "outcome", "seconds", "why"),
            [(s["step"], s["status"], str(s.get("seconds", "")), s.get("why", "")) for s in report["steps"]],
        ),
        *_completions(report),
        "Every figure is in try.json beside this page.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\n", "⏎").replace("|", "\\|").replace("<", "&lt;")


def _speed(report: dict[str, Any]) -> list[str]:
    rows = []
    for precision, f in report["precisions"].items():
        verdict = {True: "passed", False: "FAILED", None: ""}[f.get("verify", {}).get("passed")]
        start = [precision, verdict, human(f["bytes"]) if "bytes" in f else ""]
        for r in f.get("latency", []):
            ttft = f"{r['ttft_p50']:.1f} ms" if r["ttft_p50"] is not None else ""
            share = f"{r['decode_of_roofline']:.0%}"
            speed = f"{r['decode_tokens_per_s']:,.0f}"
            rows.append([*start, f"{r['batch']} x {r['context']}", speed, f"{r['ms_per_token']:.2f} ms", share, ttft])
        for r in f.get("serving", []):
            what, speed = f"serving, {r['requests']} requests x {r['context']}", f"{r['tokens_per_s']:,.0f}"
            rows.append([*start, what, speed, f"{r['ms_per_token_p50']:.2f} ms", "", f"{r['ttft_p50']:.0f} ms"])
        if not f.get("latency") and not f.get("serving"):
            rows.append([*start, "", "", "", "", ""])
    if not rows:
        return []
    header = ("", "verify", "bundle", "sequences x context", "decode, tokens/s", "a token", "of its roofline", "TTFT")
    return ["## Speed", _table(header, rows)]


def _logits(report: dict[str, Any]) -> list[str]:
    rows = []
    for precision, f in report["precisions"].items():
        if x := f.get("logits"):
            tokens = sum(p["same_tokens"] for p in x["prompts"])
            rows.append(
                [
                    precision,
                    f"{x['kl_mean']:.1e}",
                    f"{x['kl_max']:.1e}",
                    f"{x['relative_error_mean']:.1e}",
                    f"{x['same_most_likely_token']} of {len(x['prompts'])}",
                    f"{tokens} of {x['new_tokens'] * len(x['prompts'])}",
                ]
            )
    if not rows:
        return []
    header = ("", "KL, mean", "KL, largest", "logits' error", "same next token", "greedy tokens before a difference")
    return [f"## Logits on ten prompts, beside {report['reference']}", _table(header, rows)]


def _completions(report: dict[str, Any]) -> list[str]:
    made = {p: f["completions"] for p, f in report["precisions"].items() if "completions" in f}
    if not made:
        return []
    rows = [[prompt[-SHOWN:], *(texts[i] for texts in made.values())] for i, prompt in enumerate(PROMPTS)]
    return ["## What it writes, greedily", _table(("prompt", *made), rows)]
