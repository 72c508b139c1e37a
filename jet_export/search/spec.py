"""The specification of a search: its options, resolved and checked before any work."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jet_export.build.backend_choice import BackendChoice, choose_backend
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.target import target_device
from jet_export.model.config import JetNemotronConfig
from jet_export.search.choose import Selector
from jet_export.search.constraints import Constraints
from jet_export.search.database import MeasurementSetup
from jet_export.search.machine import Host
from jet_export.search.sampling import Study, choose_sampler, without_password
from jet_export.search.scores import Score, load_score
from jet_export.search.space import Space, default_space, read_space
from jet_export.utils.errors import JetExportError

RECORD_KEY = "jet_export_search"  # in best.json: the point, why it was chosen, and how to build it


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The command line's options, one to one."""

    model: str
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "bfloat16"
    space: Path | None = None
    scores: str = "parameters"
    sampler: str = "auto"
    trials: int | None = None
    whole: int = 3
    jobs: int | None = None
    timeout: float | None = None
    seed: int = 0
    output: Path | None = None
    database: Path | None = None
    resume: bool = False
    keep_engines: bool = False
    build_only: bool = False
    remeasure: bool = False
    storage: str | None = None
    ray: str | None = None  # the cluster that builds and measures
    measure_on: str | None = None  # of its nodes: a GPU's kind, or a resource that they offer

    def check_ranges(self) -> None:
        """Raises JetExportError for a number that is out of range."""
        for flag, value, least in (
            ("--trials", self.trials, 1),
            ("--jobs", self.jobs, 1),
            ("--whole", self.whole, 0),
            ("--timeout", self.timeout, 0),
        ):
            if value is not None and not value >= least:  # false for nan too
                raise JetExportError(f"{flag} {value}: must be at least {least}.")

    def record(self) -> dict[str, Any]:
        """JSON types only, and no password."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return {**values, "storage": self.storage and without_password(self.storage)}


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """What is searched, how it is measured, and where the results go."""

    options: SearchOptions
    preset: JetNemotronConfig
    space: Space
    space_file: Path
    score: Score
    sampler: str
    backend: BackendChoice
    host: Host
    setup: MeasurementSetup
    constraints: Constraints
    output: Path
    database_file: Path
    jobs: int  # engines built at a time

    @classmethod
    def from_options(cls, options: SearchOptions, host: Host | None = None) -> SearchSpec:
        """Check everything that can be checked before any work. `host`: where engines are measured, if not here. Raises
        JetExportError; writes nothing."""
        options.check_ranges()
        config = make_plan(build_options(options, host)).config
        preset = replace(config, raw={k: v for k, v in config.raw.items() if k != RECORD_KEY})
        host = host or Host.of(target_device(options.device))
        backend = choose_measured_backend(options.backend, host.arch)
        space_file = options.space or default_space(options.model, preset)
        space = read_space(space_file, preset)
        check_fp8(space, space_file, options.dtype, host)
        name = f"{Path(options.model).name.removesuffix('.json')}-{backend.name}"
        output = options.output or Path("searches") / name
        sampler = choose_sampler(options.sampler, space, preset, options.trials)
        return cls(
            options=options,
            preset=preset,
            space=space,
            space_file=space_file,
            sampler=sampler,
            score=load_score(options.scores),
            backend=backend,
            host=host,
            setup=MeasurementSetup(
                machine=host.machine,
                backend=backend.name,
                dtype=options.dtype,
                chunk=space.prefill_chunk,
                new_tokens=space.new_tokens,
                repeats=space.repeats,
                fill=space.fill,
            ),
            constraints=Constraints(
                preset=preset,
                space=space,
                dtype=torch_dtype(options.dtype),
                device_bytes=host.usable_bytes,
            ),
            output=output,
            database_file=options.database or output.parent / "measurements.db",
            jobs=options.jobs or max(1, min(4, (os.cpu_count() or 1) // 2)),
        )

    @property
    def target(self) -> tuple[int, int]:
        """(batch, context) at which points are compared."""
        return self.space.target_batch, self.space.target_context

    @property
    def selector(self) -> Selector:
        batch, context = self.target
        return Selector(batch=batch, context=context, slack_percent=self.space.slack_percent)

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Every (batch, context) that is measured; the target last."""
        grid = [(b, c) for c in self.space.context for b in self.space.batch]
        return sorted(grid, key=lambda case: case == self.target)

    @property
    def unmatched_scores(self) -> list[str]:
        """Keys of the score table that match no point."""
        return self.score.unmatched(self.space, self.preset)

    @property
    def study(self) -> Study:
        """The Optuna study of a sampled space."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]
        return Study(
            sampler=self.sampler,
            space=self.space,
            preset=self.preset,
            file=self.output / "study.db",
            storage=self.options.storage,
            name=digest,
            seed=self.options.seed,
        )

    def identity(self) -> dict[str, Any]:
        """What --resume requires to be equal."""
        values = {
            "model": self.preset.to_dict(),
            "space": self.space.describe(),
            "scores": self.options.scores,
            "sampler": self.sampler,
            "dtype": self.options.dtype,
            "backend": self.backend.name,
            "device": self.setup.machine["device"],
            "seed": self.options.seed,
        }
        identity: dict[str, Any] = json.loads(json.dumps(values))  # lists for tuples, as the file will have them
        return identity


def build_options(options: SearchOptions, host: Host | None) -> BuildOptions:
    """The preset's own build, which is planned only for its checks: of another host's, those that need no GPU."""
    return BuildOptions(
        model=options.model,
        backend=options.backend,
        device=options.device if host is None else "cpu",
        dtype=options.dtype,
        random_weights=True,
    )


def choose_measured_backend(requested: str, arch: str) -> BackendChoice:
    backend = choose_backend(requested, arch)
    if backend.name == "onnx":
        raise JetExportError("--backend onnx: an exchange format, whose evaluator says nothing of an engine's speed.")
    return backend


def check_fp8(space: Space, space_file: Path, dtype: str, host: Host) -> None:
    """Raises JetExportError where the space has FP8 points that cannot be built here."""
    if not any(space.fp8):
        return
    where = f"--space {space_file}: precision.fp8"
    if dtype != "bfloat16":
        raise JetExportError(f"{where} works on a bfloat16 model.", "Leave --dtype out.")
    if not host.fp8:
        raise JetExportError(f"{where}: this GPU has no FP8 arithmetic.")
    if find_spec("modelopt") is None:
        raise JetExportError(f"{where} needs nvidia-modelopt.", "pip install 'jet-export[fp8]'")
