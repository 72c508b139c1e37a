"""`jet-export build`: checkpoint -> (FP8) -> two exported graphs, AOTInductor packages or one ONNX graph -> bundle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from jet_export import __version__
from jet_export.bundle import (
    TOKENIZER,
    WEIGHTS,
    Manifest,
    describe_files,
    dtype_name,
    host_target,
    sha256_file,
)
from jet_export.compile_worker import compile_mode, compile_side_by_side, side_by_side
from jet_export.errors import JetExportError
from jet_export.memory import available_memory, free_cached
from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8_checkpoint import holds_kv_scales
from jet_export.model.hub import (
    checkpoint_licence,
    licence_files,
    resolve_checkpoint,
)
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.weights import CheckpointFiles, save_tensors
from jet_export.plan import BuildPlan
from jet_export.plugins.targets import sm_name, sm_of_arch
from jet_export.runtime.runner import max_prefill_tokens
from jet_export.trt.flavors import FLAVORS

CALIBRATION = Path(__file__).parent / "data" / "calibration.txt"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


class Progress:
    """Stages with their seconds; `print` is given whole lines."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self.emit = emit
        self.start = time.monotonic()

    @contextmanager
    def stage(self, name: str):
        start = time.monotonic()
        self.emit(f"  {name} ...")
        yield
        self.emit(f"  {name}: {time.monotonic() - start:.1f} s")


def build_inputs(plan: BuildPlan) -> dict[str, Any]:
    """All that the bundle depends on, for "up to date"."""
    o = plan.options
    inputs: dict[str, Any] = {
        "model": o.model if o.random_weights else plan.source,
        "config": plan.config.to_dict(),
        "weights": f"random, seed {o.seed}" if o.random_weights else _checkpoint_digest(plan.directory),
        "dtype": o.dtype,
        "fp8": o.fp8,
        "kv_cache_dtype": dtype_name(plan.kv_dtype),
        "state_dtype": dtype_name(plan.state_dtype),
        "limits": asdict(plan.limits),
        "backend": plan.backend.name,
        "target": plan.target,
        **({"sms": list(plan.sms), "onnx kept": o.keep_onnx} if plan.sms else {}),
        **(
            {"decode_one": o.decode_one} if plan.build_device.type == "cuda" and plan.backend.name == "inductor" else {}
        ),
        "versions": versions(plan.backend.name),
    }
    if o.fp8 or plan.kv_dtype == torch.float8_e4m3fn:
        inputs["calibration"] = sha256_file(o.calibration or CALIBRATION)
        inputs["keep"] = sorted(o.keep)
        inputs["fp8_lm_head"] = o.fp8_lm_head
    return inputs


def versions(backend: str) -> dict[str, str]:
    import triton

    out = {"jet_export": __version__, "torch": torch.__version__, "triton": triton.__version__}
    if backend in FLAVORS:
        out[backend] = FLAVORS[backend].version() or "not installed"
    if backend == "onnx" or backend in FLAVORS:
        out.update({name: version(name) for name in ("onnx", "onnxscript")})
    return out


def _checkpoint_digest(directory: Path | None) -> dict[str, str]:
    if directory is None:
        return {}
    return {p.name: sha256_file(p) for p in sorted(directory.glob("*.safetensors"))}


def up_to_date(plan: BuildPlan, inputs: dict[str, Any]) -> bool:
    """True where the output is this very build. Raises JetExportError naming what differs, unless --force."""
    if not plan.output.exists() or plan.options.force:
        return False
    if not plan.output.is_dir() or (any(plan.output.iterdir()) and not (plan.output / "manifest.json").exists()):
        raise JetExportError(f"--output {plan.output}: exists and is not a bundle.", "Choose another place.")
    if not any(plan.output.iterdir()):
        return False
    built, now = _flat(Manifest.load(plan.output).build.get("inputs", {})), _flat(inputs)
    differing = sorted(k for k in built.keys() | now.keys() if built.get(k) != now.get(k))
    if not differing:
        return True
    changes = "; ".join(f"{k} was {_short(built.get(k))}, now {_short(now.get(k))}" for k in differing[:3])
    raise JetExportError(
        f"{plan.output}: holds a bundle built from other inputs ({changes}).",
        "Pass --force to replace it, or --output DIR to build beside it.",
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def run_build(plan: BuildPlan, command: list[str], emit: Callable[[str], None] = print) -> Path:
    """Build the bundle. Everything happens in a temporary directory beside the output, which is renamed at the end."""
    if plan.download_bytes:
        check_requirements(plan)
        resolved = resolve_checkpoint(plan.options.model)
        plan.directory, plan.config = resolved, JetNemotronConfig.from_json_file(resolved / "config.json")
    if plan.backend.name == "onnx":
        from jet_export.onnx_export import require_onnx

        require_onnx()
    if plan.backend.name in FLAVORS:
        from jet_export.trt.build import require

        require(plan)
    inputs = build_inputs(plan)
    if up_to_date(plan, inputs):
        emit(f"{plan.output} is up to date.")
        return plan.output
    check_requirements(plan)
    start = time.monotonic()
    plan.output.parent.mkdir(parents=True, exist_ok=True)
    tmp = plan.output.parent / f".{plan.output.name}.{os.getpid()}.tmp"
    tmp.mkdir()
    try:
        manifest = _fill(plan, tmp, Progress(emit))
        manifest.files = describe_files(tmp)
        manifest.build = {
            "command": command,
            "inputs": inputs,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
        }
        manifest.save(tmp)
        if plan.sms:
            manifest.build["verified"] = _verify(plan, tmp, emit)
            manifest.save(tmp)
        replace_directory(tmp, plan.output)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return plan.output


def _verify(plan: BuildPlan, tmp: Path, emit: Callable[[str], None]) -> dict[str, Any]:
    """Verify the finished engine where this machine can run it; the bundle's manifest says what came of it.

    Raises JetExportError where it fails: then nothing is put in place.
    """
    here = sm_of_arch(host_target(plan.build_device)["arch"])
    if here not in plan.target["sms"]:
        why = f"built without a GPU of SM {', '.join(sm_name(sm) for sm in plan.target['sms'])}"
        emit(f"  NOT verified: {why}. Verify it where it is to run: jet-export verify {plan.output}")
        return {"passed": None, "why": why}
    from jet_export.verify import verify_bundle

    result = verify_bundle(tmp, None, 0, emit)
    if not result.passed:
        raise JetExportError(
            "the engine fails its verification, so that no bundle is written:\n  " + "\n  ".join(result.failures()[:12])
        )
    return {"passed": True, "device": result.device, "seconds": round(result.seconds, 1)}


def replace_directory(tmp: Path, output: Path) -> None:
    """Put the finished bundle in place; the old one survives until the new one is there."""
    old = output.parent / f".{output.name}.{os.getpid()}.old"
    if output.exists():
        output.rename(old)
    try:
        tmp.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_model(plan: BuildPlan) -> JetNemotronForCausalLM:
    device = plan.build_device
    if plan.options.random_weights:
        return random_model(plan.config, plan.dtype, device, plan.options.seed, plan.limits.max_seq_len)
    assert plan.directory is not None
    return JetNemotronForCausalLM.from_pretrained(plan.directory, plan.dtype, device, plan.limits.max_seq_len)


def _fill(plan: BuildPlan, tmp: Path, progress: Progress) -> Manifest:
    with progress.stage("load weights"):
        model = load_model(plan)
        licence = copy_side_files(plan, tmp)
    quantization = quantize_model(plan, model, tmp, progress)
    backend: dict[str, Any] = {"name": plan.backend.name, "reason": plan.backend.reason, **versions(plan.backend.name)}
    manifest = Manifest(
        model={"name": plan.options.model, "source": plan.source, "licence": licence, "config": plan.config.to_dict()},
        backend=backend,
        target=plan.target,
        dtype=dtype_name(plan.dtype),
        kv_cache_dtype=dtype_name(plan.kv_dtype),
        state_dtype=dtype_name(plan.state_dtype),
        limits=plan.limits,
        quantization=quantization,
        warnings=plan.warnings,
    )
    with progress.stage("write weights"):
        tensors = {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and _tied(model))}
        save_tensors({**tensors, "cos_sin": model.cos_sin}, tmp / WEIGHTS)
    if plan.backend.name == "inductor":
        apart = room_apart(plan, sum(t.nbytes for t in tensors.values()))
        if apart:  # the processes read the weights from their file: no copy of this one's
            del model, tensors
            manifest.save(tmp)
        _write_packages(plan, manifest, None if apart else model, tmp, progress)
        return manifest
    _write_graph(plan, model, tmp, progress)
    if plan.backend.name in FLAVORS:
        from jet_export.trt.build import write_engine

        del model, tensors  # TensorRT reads the weights from their file
        free_cached(plan.build_device)
        write_engine(plan, tmp, progress, list((quantization or {}).get("fp8", {})))
        backend["library_in_plan"] = True
    return manifest


def room_apart(plan: BuildPlan, weights: int) -> bool:
    """Whether the packages are compiled side by side; this process's memory on the GPU is given back before."""
    from jet_export.export import modes_for

    if plan.build_device.type != "cuda":
        return False
    gpu = torch.cuda.mem_get_info(plan.build_device)[0] + torch.cuda.memory_reserved(plan.build_device)
    return side_by_side(
        "cuda", len(modes_for("cuda", plan.options.decode_one)), weights, gpu, available_memory(torch.device("cpu"))
    )


def _write_packages(
    plan: BuildPlan, manifest: Manifest, model: JetNemotronForCausalLM | None, tmp: Path, progress: Progress
) -> None:
    """One after the other here, or, without the model, side by side from the weights' file."""
    from jet_export.export import modes_for

    modes = modes_for(manifest.device.type, plan.options.decode_one)
    if model is None:
        free_cached(manifest.device)
        with progress.stage(f"compile {', '.join(modes)} side by side"):
            compile_side_by_side(tmp, modes, progress.emit)
    else:
        for mode in modes:
            with progress.stage(f"compile {mode}"):
                compile_mode(model, manifest, mode, tmp)
    with progress.stage("check that the packages load"):
        check_loads(tmp, manifest.device.type)


def _write_graph(plan: BuildPlan, model: JetNemotronForCausalLM, tmp: Path, progress: Progress) -> None:
    from jet_export.onnx_export import write_onnx

    tokens = max_prefill_tokens(plan.limits.max_batch_size, plan.limits.prefill_chunk)
    with progress.stage("export and check the ONNX graph"):
        write_onnx(model, tmp, plan.kv_dtype, plan.state_dtype, tokens, plan.limits.max_batch_size)


def _tied(model: JetNemotronForCausalLM) -> bool:
    return getattr(model.lm_head, "weight", None) is model.embed_tokens.weight


def quantize_model(
    plan: BuildPlan, model: JetNemotronForCausalLM, tmp: Path, progress: Progress
) -> dict[str, Any] | None:
    """FP8 projections and KV scales as the plan asks, in place; those that the checkpoint has stay as they are."""
    from jet_export import quantize

    o, kv_fp8 = plan.options, plan.kv_dtype == torch.float8_e4m3fn
    report = quantize.read_report(model)
    if report.fp8 and (o.keep or (o.fp8_lm_head and "lm_head" not in report.fp8)):
        flag = f"--keep {o.keep[0]}" if o.keep else "--fp8-lm-head"
        raise JetExportError(f"{flag}: the checkpoint is FP8 already.", "Start from the bf16 checkpoint.")
    if report.fp8:
        progress.emit(f"    the checkpoint is FP8: {len(report.fp8)} projections as they are")
    elif o.fp8:
        batches = _calibration(plan, tmp)
        with progress.stage("calibrate and quantise to FP8 (nvidia-modelopt)"):
            report = quantize.quantize_fp8(model, batches, o.keep, o.fp8_lm_head)
        for line in report.summary():
            progress.emit(f"    {line}")
    if kv_fp8 and has_kv_scales(plan):
        report.kv_scales = quantize.kv_scales(model)
    elif kv_fp8:
        with progress.stage("calibrate the FP8 KV cache"):
            report.kv_scales = quantize.calibrate_kv_scales(model, _calibration(plan, tmp))
    return report.to_dict() if report.fp8 or kv_fp8 else None


def _calibration(plan: BuildPlan, directory: Path) -> list[torch.Tensor]:
    """Token windows of the calibration text, by the tokenizer in `directory` where there is one."""
    from jet_export.calibrate import calibration_tokens, read_calibration_text
    from jet_export.runtime.tokenizer import Tokenizer

    text = read_calibration_text(plan.options.calibration or CALIBRATION)
    tokenizer = Tokenizer(directory / TOKENIZER) if (directory / TOKENIZER).exists() else None
    # Random weights: no text makes their activations better known, and a CPU takes minutes over all of it.
    length, windows = (128, 1) if plan.options.random_weights else (512, 8)
    return calibration_tokens(tokenizer, text, plan.config.vocab_size, min(length, plan.limits.max_seq_len), windows)


def has_kv_scales(plan: BuildPlan) -> bool:
    """The weights that were loaded brought the scales of an FP8 KV cache along."""
    if plan.options.random_weights or plan.directory is None:
        return False
    return holds_kv_scales(CheckpointFiles.open(plan.directory).file_of, plan.config)


def copy_side_files(plan: BuildPlan, tmp: Path) -> str | None:
    """Tokenizer and licence of the checkpoint."""
    directory = plan.directory
    if directory is None or (plan.options.random_weights and plan.options.model != "jet-tiny"):
        return None
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, tmp / name)
    for p in licence_files(directory):
        shutil.copyfile(p, tmp / p.name)
    return checkpoint_licence(directory)


def check_requirements(plan: BuildPlan) -> None:
    """What a build needs, before it downloads or loads gigabytes. Raises JetExportError naming what is missing."""
    if plan.backend.name == "inductor":
        check_compiler()
    if plan.options.fp8 and find_spec("modelopt") is None:
        raise JetExportError("--fp8 needs nvidia-modelopt, which is not installed.", "pip install 'jet-export[fp8]'")


def check_compiler() -> None:
    """Inductor needs a C++ compiler, on a GPU too. Raises JetExportError where there is none."""
    cxx = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(cxx) is None:
        raise JetExportError(
            f"no C++ compiler: {cxx} is not on the PATH, and Inductor compiles with it.",
            "Install g++ (Debian, Ubuntu: apt-get install g++), or name another in CXX.",
        )


LOAD_PROBE = """
import sys
from pathlib import Path
import torch
from jet_export.runtime.engine import Package
for path in sys.argv[2:]:
    Package(Path(path), torch.device(sys.argv[1]))
"""


def check_loads(directory: Path, device: str = "cpu") -> None:
    """Load the packages in another process: code of an unfitting compiler can kill the one that loads it."""
    packages = sorted(str(p) for p in directory.glob("*.pt2"))
    probe = [sys.executable, "-c", LOAD_PROBE, device, *packages]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=600)
    if done.returncode == 0:
        return
    if done.returncode < 0:
        how = f"the process that loads them dies of {signal.Signals(-done.returncode).name}"
    else:
        how = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise JetExportError(
        f"the compiled packages do not load: {how}.",
        f"The C++ compiler ({os.environ.get('CXX', 'g++')}) does not fit this Python's libstdc++. Name the system's: "
        "export CC=/usr/bin/gcc CXX=/usr/bin/g++, and build again.",
    )
