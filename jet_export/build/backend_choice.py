"""Which backend to build for: the one that was asked for, or one that is known to run on the architecture."""

from __future__ import annotations

from dataclasses import dataclass

from jet_export.utils.errors import JetExportError


@dataclass(frozen=True)
class Seen:
    """An engine kind running on an architecture. `file`: of the repository, a test or a result that shows it."""

    where: str
    file: str


# Backend -> architectures it has run on.
SEEN_RUNNING: dict[str, dict[str, Seen]] = {
    "inductor": {
        "x86_64": Seen("in CI", "tests/verify/test_parity.py"),
        "sm_90": Seen("on an NVIDIA H200", "benchmarks/results/h200/end-to-end.json"),
    },
}
FALLBACK = "inductor"  # its kernels are compiled by Triton for whatever is there
# onnx writes the graph, an exchange format; the evaluator that runs it here is for checks.
KNOWN = ("inductor", "onnx", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class BackendChoice:
    """`warning`: what a user should do before relying on it."""

    name: str
    reason: str
    warning: str | None = None


def choose_backend(requested: str, arch: str) -> BackendChoice:
    """`auto` or a name -> the backend for `arch` ("sm_90", "x86_64"), and why."""
    if requested == "auto":
        for name, seen in SEEN_RUNNING.items():
            if arch in seen:
                return BackendChoice(name, f"auto: verified and run on {arch}, {seen[arch].where}")
        return BackendChoice(
            FALLBACK,
            f"auto: no engine kind has been seen running on {arch}",
            f"backend {FALLBACK} has not been seen running on {arch}: run jet-export verify before relying on it",
        )
    if requested not in KNOWN:
        raise JetExportError(f"--backend {requested}: not known.", f"Known: auto, {', '.join(KNOWN)}.")
    return BackendChoice(requested, "asked for by name")
