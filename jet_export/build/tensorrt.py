"""The steps of `jet-export build` for a TensorRT engine: graph, plugin library, plan, layer report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jet_export.backends.onnx.export import GRAPH, require_onnx
from jet_export.backends.tensorrt import builder
from jet_export.backends.tensorrt.flavors import FLAVORS, Flavor
from jet_export.backends.tensorrt.layers import REPORT, LayerReport, check, expected, read_dump
from jet_export.backends.tensorrt.profiles import profiles
from jet_export.bundle.dtypes import dtype_name
from jet_export.plugins.library import NAME as LIBRARY
from jet_export.plugins.library import library_for, require_tools
from jet_export.plugins.table import TABLE
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from jet_export.build.plan import BuildPlan
    from jet_export.utils.progress import Progress

SHOWN = 6


def require(plan: BuildPlan) -> None:
    """What a build needs, before it begins. Raises JetExportError naming what is missing."""
    o = plan.options
    FLAVORS[plan.backend.name].require(f"--backend {plan.backend.name}")
    require_onnx()
    require_tools(o.tensorrt_headers, o.fetch_headers)


def write_engine(plan: BuildPlan, tmp: Path, progress: Progress, fp8: list[str]) -> None:
    """Plan, plugin library and layer report into `tmp`, from the graph and the weights there. `fp8`: published names of
    the FP8 layers.

    Raises JetExportError where TensorRT fails, or builds something other than the graph asks for.
    """
    o, graph = plan.options, tmp / GRAPH
    flavor = FLAVORS[plan.backend.name]
    with progress.stage("compile the plugin library"):
        folder = library_for(
            plan.config, plan.sms, dtype_name(plan.dtype), dtype_name(plan.state_dtype), dtype_name(plan.kv_dtype),
            o.tensorrt_headers, o.fetch_headers, lambda line: progress.emit(f"    {line}"),
        )  # fmt: skip
        shutil.copyfile(folder / LIBRARY, tmp / LIBRARY)
        shutil.copyfile(folder / TABLE, tmp / f"plugin_{TABLE}")
    with progress.stage(f"{flavor.title}: parse and build"):
        report = build_plan(
            flavor, graph, tmp / LIBRARY, list(plan.sms), profiles(graph, plan.config, plan.limits), tmp
        )
    problems = check(report, expected(graph, fp8))
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise JetExportError(
            f"{flavor.title} built an engine other than the graph asks for:\n  " + "\n  ".join(problems[:SHOWN]) + more,
            "This is a defect of jet-export or TensorRT: please report it with the command and the versions.",
        )
    report.save(tmp / REPORT)
    if not o.keep_onnx:
        graph.unlink()


def build_plan(
    flavor: Flavor, graph: Path, library: Path, sms: list[int], shapes: list[Any], directory: Path, embed: bool = True
) -> LayerReport:
    """Run builder.py in its process; engine.plan goes into `directory`. Raises JetExportError with TensorRT's words."""
    spec = {
        "backend": flavor.backend, "graph": str(graph), "library": str(library), "sms": sms, "profiles": shapes,
        "embed": embed,
    }  # fmt: skip
    with TemporaryDirectory(prefix=".trt-", dir=directory) as work, flavor.parser_environment() as env:
        (Path(work) / "spec.json").write_text(json.dumps(spec))
        command = [sys.executable, "-m", builder.__name__, f"{work}/spec.json", work]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            died = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
            raise JetExportError(f"{flavor.title}: the process that builds ended with {died}:\n{_tail(done.stderr)}")
        result = json.loads((Path(work) / builder.RESULT).read_text())
        if not result["built"]:
            plugins = [line for line in done.stderr.splitlines() if line.startswith("jet::")]  # where no logger is yet
            said = _said(plugins + result["errors"])
            raise JetExportError(f"{flavor.title} {result['version']} built no engine:\n{said}")
        (Path(work) / builder.PLAN).rename(directory / builder.PLAN)
        return read_dump((Path(work) / builder.LAYERS).read_text())


def _tail(text: str) -> str:
    return text.strip()[-2000:]


def _said(errors: list[str]) -> str:
    return "\n".join(f"  {e.strip()}" for e in dict.fromkeys(errors[:SHOWN])) or "  (it gave no reason)"
