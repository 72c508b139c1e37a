"""Runs the rungs in order, each in a process of its own, up to the first that fails, and writes the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch
from rich.table import Table

from jet_export.bundle.manifest import Manifest
from jet_export.ladder.rungs import RUNGS, why_skipped
from jet_export.ladder.site import Site
from jet_export.utils.environment import environment
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically
from jet_export.utils.version import __version__

Emit = Callable[[str], None]
PACKAGES = ("tensorrt", "tensorrt-rtx", "onnx", "onnxscript", "nvidia-modelopt", "numpy")
PASSED, FAILED, INCOMPLETE = "passed", "failed", "incomplete"
SHOWN = 3  # failures of a rung that the table shows
FP8_SM = (8, 9)


@dataclass(frozen=True, kw_only=True)
class LadderOptions:
    """The options of `jet-export verify --ladder`."""

    bundle: Path | None  # None: build jet-tiny here
    report: Path  # JSON
    tensorrt_headers: Path | None = None
    fetch_headers: bool = False
    text: Path | None = None  # held-out, for the quality figures
    seed: int = 0


def climb(o: LadderOptions, emit: Emit) -> dict[str, Any]:
    """Run the ladder for a bundle, or for jet-tiny built here, and write the report. Returns the report.

    outcome: "passed" where every rung did, "failed", or "incomplete" where nothing failed but a rung could not run.
    """
    bundle = o.bundle
    o.report.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="jet-export-ladder-")))
        rungs: list[dict[str, Any]] = []
        if bundle is None:
            bundle, build = build_tiny(work, o.tensorrt_headers, o.fetch_headers, emit)
            rungs.append(build)
        if bundle is not None:
            site = Site(
                bundle=bundle,
                work=work,
                headers=o.tensorrt_headers,
                fetch_headers=o.fetch_headers,
                text=o.text,
                seed=o.seed,
            )
            manifest = Manifest.load(bundle)  # raises where there is no bundle, before anything runs
            rungs += run_rungs(site, emit)
        result = {
            "outcome": outcome(rungs),
            "rungs": rungs,
            "bundle": about(bundle, manifest) if bundle is not None else None,
            "environment": {**environment(), **versions()},
        }
    write_atomically(o.report, json.dumps(result, indent=2) + "\n")
    return result


def run_rungs(site: Site, emit: Emit) -> list[dict[str, Any]]:
    """Every rung's entry in the report. After the first failure the rest are "not run"."""
    out: list[dict[str, Any]] = []
    failed = ""
    for name in RUNGS:
        if failed:
            out.append({"rung": name, "status": "not run", "reason": f"{failed} failed"})
            continue
        emit(f"  {name} ...")
        start = time.monotonic()
        result = {
            "rung": name,
            **(why_skipped(name, site) or in_own_process(name, site, emit)),
            "seconds": round(time.monotonic() - start, 1),
        }
        why = f": {result['reason']}" if "reason" in result else ""
        emit(f"  {name}: {result['status']}{why} ({result['seconds']:.1f} s)")
        out.append(result)
        failed = name if result["status"] == FAILED else ""
    return out


def in_own_process(name: str, site: Site, emit: Emit) -> dict[str, Any]:
    """Run a rung in a process. Returns its entry in the report; a crash is a failure that says how it ended."""
    spec, result = site.work / "spec.json", site.work / "result.json"
    spec.write_text(json.dumps(asdict(site), default=str))
    result.unlink(missing_ok=True)
    env = os.environ | {"TRITON_INTERPRET": "0" if site.device.type == "cuda" else "1"}
    command = [sys.executable, "-u", "-m", "jet_export.ladder.rungs", name, str(spec), str(result)]
    with (
        TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            emit(f"    {line.strip()}")
        process.wait()
        errors.seek(0)
        said = errors.read().strip()
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"status {process.returncode}"
    return {"status": FAILED, "failures": [f"its process ended with {how}:\n{said[-2000:]}"]}


def outcome(rungs: list[dict[str, Any]]) -> str:
    states = {rung["status"] for rung in rungs}
    return FAILED if FAILED in states else PASSED if states == {PASSED} else INCOMPLETE


def build_tiny(work: Path, headers: Path | None, fetch: bool, emit: Emit) -> tuple[Path | None, dict[str, Any]]:
    """Build jet-tiny with the TensorRT that runs here, or else its ONNX graph. Returns the bundle (None where the build
    failed), and the build's entry in the report."""
    from importlib.util import find_spec

    from jet_export.build.build import run_build
    from jet_export.build.plan import BuildOptions, make_plan
    from jet_export.build.steps import check_requirements, require_backend

    backend, why = tensorrt_here()
    fp8 = find_spec("modelopt") is not None
    if torch.cuda.is_available():
        fp8 = fp8 and torch.cuda.get_device_capability() >= FP8_SM
    out = work / "jet-tiny"
    given = {"tensorrt_headers": headers, "fetch_headers": fetch} if backend != "onnx" else {}
    options = BuildOptions(model="jet-tiny", backend=backend, fp8=fp8, max_seq_len=1024, output=out, **given)  # type: ignore[arg-type]
    emit(f"  build jet-tiny, {'FP8' if fp8 else 'bf16'}, {backend} ({why}) ...")
    start = time.monotonic()
    rung: dict[str, Any] = {"rung": "build", "figures": {"model": "jet-tiny", "backend": backend, "fp8": fp8}}
    plan = make_plan(options)
    require_backend(plan)  # a missing requirement is the user's to install, not a failed rung
    check_requirements(plan)
    try:
        run_build(plan, ["jet-export", "build", "--backend", backend], emit)
    except JetExportError as e:
        return None, {**rung, "status": FAILED, "failures": [str(e)]}
    seconds = round(time.monotonic() - start, 1)
    if backend == "onnx":
        return out, {**rung, "status": "skipped", "reason": f"no TensorRT engine: {why}", "seconds": seconds}
    return out, {**rung, "status": PASSED, "seconds": seconds}


def tensorrt_here() -> tuple[str, str]:
    """The backend to build jet-tiny with, and why."""
    from jet_export.backends.tensorrt.flavors import FLAVORS

    if not torch.cuda.is_available():
        return "onnx", "no GPU"
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    for flavor in FLAVORS.values():
        if flavor.version() is not None and (not flavor.sms or sm in flavor.sms):
            return flavor.backend, f"{flavor.title} {flavor.version()} is installed"
    return "onnx", f"no TensorRT for SM {major}.{minor} is installed"


def about(bundle: Path, m: Manifest) -> dict[str, Any]:
    """What a reader of the report needs to know about the bundle, without paths of this machine."""
    source = m.model["source"]
    return {
        "name": bundle.name,
        "model": Path(m.model["name"]).name,
        "source": Path(source).name if Path(source).is_absolute() else source,
        "backend": m.backend,
        "target": m.target,
        "dtype": m.dtype,
        "kv_cache_dtype": m.kv_cache_dtype,
        "state_dtype": m.state_dtype,
        "fp8_layers": len(m.fp8_layers),
        "limits": asdict(m.limits),
    }


def versions() -> dict[str, str]:
    out = {"jet-export": __version__}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def brief(failure: str) -> str:
    """The first and last line of a failure; the report has all of it."""
    first, *_, last = [*failure.splitlines(), ""] if "\n" not in failure else failure.splitlines()
    return f"{first} {last}".rstrip()


def table(result: dict[str, Any]) -> Table:
    out = Table(box=None, header_style="bold")
    for column in ("rung", "", "seconds", "why"):
        out.add_column(column, justify="right" if column == "seconds" else "left")
    for rung in result["rungs"]:
        failures = rung.get("failures", [])
        more = [f"and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
        why = "\n".join([*map(brief, failures[:SHOWN]), *more]) or rung.get("reason", "")
        seconds = f"{rung['seconds']:.1f}" if "seconds" in rung else ""
        out.add_row(rung["rung"], rung["status"].upper() if failures else rung["status"], seconds, why)
    return out


def summary(result: dict[str, Any]) -> str:
    rungs = result["rungs"]
    passed = sum(rung["status"] == PASSED for rung in rungs)
    if result["outcome"] == PASSED:
        return f"PASSED: all {passed} rungs"
    if result["outcome"] == FAILED:
        return f"FAILED at: {next(rung['rung'] for rung in rungs if rung['status'] == FAILED)}"
    return f"INCOMPLETE: {passed} of {len(rungs)} rungs passed, the others could not run here and are not verified"
