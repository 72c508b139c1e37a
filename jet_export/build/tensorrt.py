"""The steps of `jet-export build` for a TensorRT engine: plugin library, plan, layer report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from jet_export.backends.onnx.export import GRAPH, require_onnx
from jet_export.backends.tensorrt import builder
from jet_export.backends.tensorrt.builder import BuildSpec
from jet_export.backends.tensorrt.flavors import FLAVORS
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
    """Raises JetExportError naming what the build needs and this machine lacks."""
    o = plan.options
    FLAVORS[plan.backend.name].require(f"--backend {plan.backend.name}")
    require_onnx()
    require_tools(o.tensorrt_headers, o.fetch_headers)


def write_engine(plan: BuildPlan, tmp: Path, progress: Progress, fp8: list[str]) -> None:
    """Write plan, plugin library and layer report into `tmp`, from the graph and the weights there. `fp8`: published
    names of the FP8 layers.

    Raises JetExportError where TensorRT fails, or builds an engine that does not match the graph.
    """
    o, graph = plan.options, tmp / GRAPH
    flavor = FLAVORS[plan.backend.name]
    with progress.stage("compile the plugin library"):
        folder = library_for(
            plan.config,
            plan.sms,
            dtype=dtype_name(plan.dtypes.model),
            state_dtype=dtype_name(plan.dtypes.state),
            cache_dtype=dtype_name(plan.dtypes.kv_cache),
            headers=o.tensorrt_headers,
            fetch=o.fetch_headers,
            emit=lambda line: progress.emit(f"    {line}"),
        )
        shutil.copyfile(folder / LIBRARY, tmp / LIBRARY)
        shutil.copyfile(folder / TABLE, tmp / f"plugin_{TABLE}")
    with progress.stage(f"{flavor.title}: parse and build", expected=plan.seconds):
        spec = BuildSpec(
            backend=flavor.backend,
            graph=str(graph),
            library=str(tmp / LIBRARY),
            sms=list(plan.sms),
            profiles=profiles(graph, plan.config, plan.limits),
        )
        report = build_plan(spec, tmp)
    problems = check(report, expected(graph, fp8))
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise JetExportError(
            f"{flavor.title} built an engine that does not match the graph:\n  " + "\n  ".join(problems[:SHOWN]) + more,
            "This is a defect of jet-export or TensorRT: please report it with the command and the versions.",
        )
    report.save(tmp / REPORT)
    if not o.keep_onnx:
        graph.unlink()


def build_plan(spec: BuildSpec, directory: Path) -> LayerReport:
    """Write engine.plan into `directory`, by builder.py in a process of its own. Raises JetExportError with TensorRT's
    errors."""
    flavor = FLAVORS[spec.backend]
    with TemporaryDirectory(prefix=".trt-", dir=directory) as work, flavor.parser_environment() as env:
        (Path(work) / "spec.json").write_text(json.dumps(asdict(spec)))
        command = [sys.executable, "-m", builder.__name__, f"{work}/spec.json", work]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            died = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
            raise JetExportError(f"{flavor.title}: the process that builds ended with {died}:\n{_tail(done.stderr)}")
        result = json.loads((Path(work) / builder.RESULT).read_text())
        if not result["built"]:
            plugins = [
                line for line in done.stderr.splitlines() if line.startswith("jet::")
            ]  # before there is a logger
            said = _said(plugins + result["errors"])
            raise JetExportError(f"{flavor.title} {result['version']} built no engine:\n{said}")
        (Path(work) / builder.PLAN).rename(directory / builder.PLAN)
        return read_dump((Path(work) / builder.LAYERS).read_text())


def _tail(text: str) -> str:
    return text.strip()[-2000:]


def _said(errors: list[str]) -> str:
    return "\n".join(f"  {e.strip()}" for e in dict.fromkeys(errors[:SHOWN])) or "  (it gave no reason)"
