"""Which backend to build for: the one that was asked for, or one that is known to run on the architecture."""

from __future__ import annotations

from dataclasses import dataclass

from jet_export.utils.errors import JetExportError

# Backend -> architectures it has run on, with the committed result that shows it. `auto` picks nothing else.
SEEN_RUNNING: dict[str, dict[str, str]] = {
    "inductor": {
        "x86_64": "tests/verify/test_parity.py",
        "sm_90": "benchmarks/results/h200/end-to-end.json",
    },
}
# onnx writes the graph, an exchange format; the evaluator that runs it here is for checks.
KNOWN = ("inductor", "onnx", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class BackendChoice:
    name: str
    reason: str


def choose_backend(requested: str, arch: str) -> BackendChoice:
    """`auto` or a name -> the backend for `arch` ("sm_90", "x86_64"), and why."""
    if requested == "auto":
        for name, seen in SEEN_RUNNING.items():
            if arch in seen:
                return BackendChoice(name, f"auto: runs on {arch} (shown by {seen[arch]})")
        raise JetExportError(
            f"--backend auto: no engine kind has a committed result on {arch}.",
            f"Choose one by name and verify it: --backend {KNOWN[0]}, then jet-export verify.",
        )
    if requested not in KNOWN:
        raise JetExportError(f"--backend {requested}: not known.", f"Known: auto, {', '.join(KNOWN)}.")
    return BackendChoice(requested, "asked for by name")
