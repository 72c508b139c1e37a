"""One bundle: verified, compared on the ten prompts and, where it passed, timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_export.bench.command import BenchOptions, run_bench
from jet_export.bench.protocols import Asked
from jet_export.bench.verified import remember
from jet_export.bundle.manifest import Manifest
from jet_export.runtime.llm import LLM
from jet_export.tryout.outputs import Outputs, compare, run_prompts
from jet_export.tryout.report import Report
from jet_export.utils.errors import JetExportError
from jet_export.verify.verify import verify_bundle


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A bundle, what it is compared with, and its figures, which the methods fill."""

    bundle: Path
    precision: str
    prompts: list[list[int]]
    reference: Outputs | None
    figures: dict[str, Any]

    def run(self, report: Report) -> None:
        passed = report.step(f"{self.precision}: verify", lambda: self.verify(report))
        report.step(f"{self.precision}: ten prompts", self.compare)
        if not passed:
            report.not_run(f"{self.precision}: speed", "verify failed, and no speed is given without it")
            return
        for protocol in ("latency", "serving"):
            report.step(f"{self.precision}: {protocol}", lambda p=protocol: self.measure(p, report))  # type: ignore[misc]

    def verify(self, report: Report) -> bool:
        result = verify_bundle(self.bundle, None, 0, report.emit)
        remember(self.bundle, result)
        self.figures["verify"] = result.to_dict()
        if not result.passed:
            raise JetExportError(f"verify: {result.failures()[0]}")
        return True

    def compare(self) -> None:
        llm = LLM(self.bundle)
        manifest = llm.manifest
        self.figures["bytes"] = sum(f["bytes"] for f in manifest.files.values())
        ours = run_prompts(llm, self.prompts, f"{self.precision}, {manifest.backend['name']}")
        self.figures["completions"] = [llm.tokenizer.decode(t) for t in ours.tokens.tolist()]
        if self.reference is not None:
            self.figures["logits"] = compare(ours, self.reference)

    def measure(self, protocol: str, report: Report) -> None:
        manifest = Manifest.load(self.bundle)
        seconds = 10.0 if manifest.device.type == "cuda" else 1.0
        options = BenchOptions(bundle=self.bundle, asked=short(protocol, manifest), fill_seconds=seconds)
        command = ["jet-export", "bench", str(self.bundle), "--protocol", protocol]
        (run,) = run_bench(options, command, report.emit)["bundles"]
        self.figures[protocol] = run["serving" if protocol == "serving" else "rows"]


def short(protocol: str, manifest: Manifest) -> Asked:
    """latency: one sequence, and a full batch; serving: a burst of requests. Up to 1,024 tokens on a GPU."""
    limits, gpu = manifest.limits, manifest.device.type == "cuda"
    new = min(64 if gpu else 4, limits.max_seq_len // 2)
    context = min(1024 if gpu else 32, limits.max_seq_len - new)
    batches = {limits.max_batch_size} if protocol == "serving" else {1, limits.max_batch_size}
    return Asked(protocol=protocol, contexts=(context,), batches=tuple(sorted(batches)), new_tokens=new)
