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

from jet_export.backends.onnx.export import GRAPH, VERIFY_GRAPH, require_onnx
from jet_export.backends.tensorrt import builder
from jet_export.backends.tensorrt.builder import BuildSpec
from jet_export.backends.tensorrt.flavors import FLAVORS
from jet_export.backends.tensorrt.layers import REPORT, VERIFY_REPORT, LayerReport, check, expected, read_dump
from jet_export.backends.tensorrt.profiles import NAMES, VERIFY_NAMES, profiles
from jet_export.bundle.dtypes import dtype_name
from jet_export.plugins.library import NAME as LIBRARY
from jet_export.plugins.library import library_for, require_tools
from jet_export.plugins.table import TABLE
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from jet_export.build.plan import BuildPlan
    from jet_export.utils.progress import Progress

SHOWN = 6
ENGINES = {GRAPH: (builder.PLAN, REPORT, NAMES), VERIFY_GRAPH: (builder.VERIFY_PLAN, VERIFY_REPORT, VERIFY_NAMES)}


def require(plan: BuildPlan) -> None:
    """Raises JetExportError naming what the build needs and this machine lacks."""
    o = plan.options
    FLAVORS[plan.backend.name].require(f"--backend {plan.backend.name}")
    require_onnx()
    require_tools(o.tensorrt_headers, o.fetch_headers)


def write_engine(plan: BuildPlan, tmp: Path, progress: Progress, fp8: list[str]) -> None:
    """Write plan, plugin library and layer report into `tmp`, from the graph and the weights there; where drafts are
    verified, the plan and report of that graph too. `fp8`: published names of the FP8 layers.

    Raises JetExportError where TensorRT fails, or builds an engine that does not match the graph.
    """
    o = plan.options
    with progress.stage("compile the plugin library"):
        folder = library_for(
            plan.config,
            plan.sms,
            dtype=dtype_name(plan.dtypes.model),
            state_dtype=dtype_name(plan.dtypes.state),
            cache_dtype=dtype_name(plan.dtypes.kv_cache),
            state_interval=plan.dtypes.state_interval,
            rollback=plan.dtypes.rollback,
            headers=o.tensorrt_headers,
            fetch=o.fetch_headers,
            emit=lambda line: progress.emit(f"    {line}"),
        )
        shutil.copyfile(folder / LIBRARY, tmp / LIBRARY)
        shutil.copyfile(folder / TABLE, tmp / f"plugin_{TABLE}")
    for name in (GRAPH, VERIFY_GRAPH) if plan.dtypes.rollback else (GRAPH,):
        write_plan(plan, tmp, progress, fp8, name)


def write_plan(plan: BuildPlan, tmp: Path, progress: Progress, fp8: list[str], name: str) -> None:
    """Write the plan and the layer report of one graph, GRAPH or VERIFY_GRAPH. The graph goes unless it is kept."""
    flavor, graph = FLAVORS[plan.backend.name], tmp / name
    file, report_file, modes = ENGINES[name]
    with progress.stage(f"{flavor.title}: parse and build {file}", expected=plan.seconds):
        spec = BuildSpec(
            backend=flavor.backend,
            graph=str(graph),
            library=str(tmp / LIBRARY),
            sms=list(plan.sms),
            profiles=profiles(graph, plan.config, plan.limits, modes, plan.dtypes.rollback),
        )
        report = build_plan(spec, tmp, file)
    problems = check(report, expected(graph, fp8), modes)
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise JetExportError(
            f"{flavor.title} built an engine that does not match the graph:\n  " + "\n  ".join(problems[:SHOWN]) + more,
            "This is a defect of jet-export or TensorRT: please report it with the command and the versions.",
        )
    report.save(tmp / report_file)
    if not plan.options.keep_onnx:
        graph.unlink()


def build_plan(spec: BuildSpec, directory: Path, file: str = builder.PLAN) -> LayerReport:
    """Write the plan `file` into `directory`, by builder.py in a process of its own.

    Raises JetExportError with TensorRT's errors."""
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
        (Path(work) / builder.PLAN).rename(directory / file)
        return read_dump((Path(work) / builder.LAYERS).read_text())


def _tail(text: str) -> str:
    return text.strip()[-2000:]


def _said(errors: list[str]) -> str:
    return "\n".join(f"  {e.strip()}" for e in dict.fromkeys(errors[:SHOWN])) or "  (it gave no reason)"
