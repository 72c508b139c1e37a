"""A model repository for Triton Inference Server: DIR/<model>/config.pbtxt and DIR/<model>/1/model.py."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from jet_export.bundle.manifest import Manifest
from jet_export.bundle.signature import trusted_key
from jet_export.runtime.capacity import Serving
from jet_export.server.triton.tensors import INPUTS, OUTPUTS, TensorSpec
from jet_export.utils.errors import JetExportError

HEADER = "# Written by jet-export serve."


@dataclass(frozen=True)
class Repository:
    """The contents of a repository. `gpus`: indices as Triton counts them; `instances` run on each, or on the CPU."""

    bundle: Path
    _: KW_ONLY
    serving: Serving = field(default_factory=Serving)
    instances: int = 1
    gpus: tuple[int, ...] = (0,)
    step_timeout: float = 0.0  # seconds that a step may take before an instance's process ends; 0: no limit

    def files(self) -> tuple[str, dict[str, str]]:
        """(model name, path -> text). Raises JetExportError for bad options, or if `bundle` is not a bundle."""
        if self.instances < 1:
            raise JetExportError(f"--instances {self.instances}: at least 1.")
        if not self.gpus or len(set(self.gpus)) < len(self.gpus) or min(self.gpus) < 0:
            raise JetExportError("--gpus: different indices from 0 on, such as 0,1.")
        manifest = Manifest.load(self.bundle)
        name = Path(str(manifest.model["name"])).name.removesuffix(".json") or "model"  # may be a path, or OWNER/NAME
        gpus = self.gpus if manifest.device.type == "cuda" else None
        parameters = {"bundle": str(self.bundle.resolve())}
        if key := trusted_key():
            parameters["trusted_key"] = str(key.resolve())
        if self.step_timeout:
            parameters["step_timeout"] = json.dumps(self.step_timeout)
        parameters |= {k: json.dumps(v) for k, v in dataclasses.asdict(self.serving).items() if v is not None}
        adapter = Path(__file__).with_name("adapter.py").read_text(encoding="utf-8")
        return name, {"config.pbtxt": config_pbtxt(name, parameters, self.instances, gpus), "1/model.py": adapter}


def gpu_indices(text: str) -> tuple[int, ...]:
    """ "0,1" -> (0, 1)."""
    try:
        return tuple(int(index) for index in text.split(","))
    except ValueError:
        raise JetExportError(f"--gpus {text}: not indices such as 0,1.") from None


def config_pbtxt(name: str, parameters: dict[str, str], instances: int, gpus: tuple[int, ...] | None) -> str:
    group = "kind: KIND_CPU" if gpus is None else f"kind: KIND_GPU gpus: [ {', '.join(map(str, gpus))} ]"
    return "\n".join(
        [
            HEADER,
            f"name: {_quoted(name)}",
            'backend: "python"',
            "max_batch_size: 0  # the engine batches requests itself, at every step",
            "model_transaction_policy { decoupled: true }",
            f"instance_group [ {{ count: {instances} {group} }} ]",
            *(
                f"parameters {{ key: {_quoted(k)} value {{ string_value: {_quoted(v)} }} }}"
                for k, v in parameters.items()
            ),
            *(f"input {{ {_tensor(t)} optional: true }}" for t in INPUTS),
            *(f"output {{ {_tensor(t)} }}" for t in OUTPUTS),
            "",
        ]
    )


def _tensor(t: TensorSpec) -> str:
    return f'name: "{t.name}" data_type: TYPE_{t.kind} dims: [ {t.dim} ]'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def write_repository(
    directory: Path, repository: Repository, force: bool = False, log: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the model into the repository `directory`, created if missing; other models in it are left alone.

    Returns the model's directory. It is written to a temporary directory, which is renamed at the end. Raises
    JetExportError if `directory` holds something else, or, without `force`, this model with other settings.
    """
    name, files = repository.files()
    _check_repository(directory)
    model = directory / name
    if model.exists() and _same(model, files, force):
        log(f"{model} is up to date.")
        return model
    tmp = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    old = directory.parent / f".{directory.name}.{os.getpid()}.old"
    try:
        for path, text in files.items():
            (tmp / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp / path).write_text(text, encoding="utf-8")
        directory.mkdir(parents=True, exist_ok=True)
        if model.exists():
            model.rename(old)
        tmp.rename(model)
    except OSError as e:
        if old.exists() and not model.exists():
            old.rename(model)
        raise JetExportError(f"--triton-repo {directory}: {e}.", "Choose another place.") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    for path in files:
        log(f"wrote {model / path}")
    rate_limit = " --rate-limit=execution_count" if repository.instances * len(repository.gpus) > 1 else ""
    log(f"Next: tritonserver --model-repository={directory}{rate_limit}")
    return model


def _check_repository(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir() or not all(_is_model(p) for p in directory.iterdir()):
        raise JetExportError(
            f"--triton-repo {directory}: exists and is not a model repository.", "Choose another place."
        )


def _is_model(path: Path) -> bool:
    return path.is_dir() and ((path / "config.pbtxt").is_file() or any(p.name.isdigit() for p in path.iterdir()))


def _same(model: Path, files: dict[str, str], force: bool) -> bool:
    """Whether `model` holds `files`. Raises JetExportError if it is not ours, or differs and `force` is not given."""
    config = model / "config.pbtxt"
    if not config.is_file() or not config.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
        raise JetExportError(f"{model}: a model that jet-export did not write.", "Choose another --triton-repo.")
    found = {p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    texts = {path: (model / path).read_text(encoding="utf-8", errors="replace") for path in found & files.keys()}
    if texts == files and not force:
        return True
    if not force:
        raise JetExportError(
            f"{model}: holds this model with other settings or changed by hand.",
            "Pass --force to replace it, or choose another --triton-repo.",
        )
    return False
