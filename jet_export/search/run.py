"""One search, from its options to its files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jet_export.build.backend_choice import BackendChoice, choose_backend
from jet_export.build.plan import BuildOptions, make_plan
from jet_export.bundle.dtypes import torch_dtype
from jet_export.bundle.memory import USABLE, available_memory, parameter_count
from jet_export.bundle.target import host_target, target_device
from jet_export.model.config import JetNemotronConfig
from jet_export.search.cells import Cell, base_cell, cells_of, layer_cells, whole_cell
from jet_export.search.choose import Evaluation, choose, pareto, to_build_whole
from jet_export.search.compose import Composer, Latency
from jet_export.search.constraints import Scene
from jet_export.search.database import PHASES, Bench, Database, Entry, machine
from jet_export.search.directory import check_output, open_output
from jet_export.search.points import Point, all_points, count_points
from jet_export.search.sampling import TRIALS, Values, choose_sampler, sample
from jet_export.search.scores import Score, load_score
from jet_export.search.space import Space, default_space, read_space
from jet_export.search.work import Hands, Processes, Workshop
from jet_export.utils.console import human
from jet_export.utils.errors import JetExportError


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


@dataclass
class Search:
    """A search in progress, and what came of it."""

    options: SearchOptions
    preset: JetNemotronConfig
    space: Space
    space_file: Path
    score: Score
    sampler: str
    backend: BackendChoice
    device: torch.device
    bench: Bench
    scene: Scene
    output: Path
    database_file: Path
    jobs: int
    evaluations: dict[Point, Evaluation] = field(default_factory=dict)
    layers: dict[Cell, dict[tuple[int, int, str], float]] = field(default_factory=dict)
    base: dict[tuple[int, int, str], float] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)
    filled: dict[Cell, dict[tuple[int, int, str], str]] = field(default_factory=dict)  # "prefill" or "synthetic"
    why: str = ""
    noisy: tuple[int, int] = (0, 0)  # measurements that repeats do not confirm within 10 %, of all
    at_odds: dict[tuple[int, int, str], str] = field(default_factory=dict)  # cases without sums, and why
    timed_out: bool = False
    seconds: float = 0.0

    @property
    def target(self) -> tuple[int, int]:
        return self.space.target_batch, self.space.target_context

    @property
    def cases(self) -> list[tuple[int, int]]:
        """The grid; the target last."""
        grid = [(b, c) for c in self.space.context for b in self.space.batch]
        return sorted(grid, key=lambda case: case == self.target)

    @property
    def unmatched(self) -> list[str]:
        return self.score.unmatched(self.space, self.preset)

    @property
    def chosen(self) -> Evaluation | None:
        return next((e for e in self.evaluations.values() if e.chosen), None)

    @property
    def front(self) -> list[Evaluation]:
        front = [e for e in self.evaluations.values() if e.front]
        return sorted(front, key=lambda e: -e.tokens_per_s(*self.target))

    def identity(self) -> dict[str, Any]:
        """What makes this search this one, for --resume."""
        o = self.options
        return json.loads(json.dumps({
            "model": self.preset.to_dict(), "space": self.space.describe(), "scores": o.scores, "sampler": self.sampler,
            "dtype": o.dtype, "backend": self.backend.name, "device": self.bench.machine["device"], "seed": o.seed,
        }))  # fmt: skip


def prepare(options: SearchOptions) -> Search:
    """Check everything that can be checked before any work. Raises JetExportError; writes nothing."""
    for flag, value, least in (
        ("--trials", options.trials, 1),
        ("--jobs", options.jobs, 1),
        ("--whole", options.whole, 0),
        ("--timeout", options.timeout, 0),
    ):
        if value is not None and not value >= least:  # nan is neither
            raise JetExportError(f"{flag} {value}: must be at least {least}.")
    plan = make_plan(
        BuildOptions(
            model=options.model,
            backend=options.backend,
            device=options.device,
            dtype=options.dtype,
            random_weights=True,
        )
    )
    device = target_device(options.device)
    backend = choose_backend(options.backend, host_target(device)["arch"])
    if backend.name == "onnx":
        raise JetExportError("--backend onnx: an exchange format, whose evaluator says nothing of an engine's speed.")
    preset = replace(plan.config, raw={k: v for k, v in plan.config.raw.items() if k != RECORD_KEY})
    space_file = options.space or default_space(options.model)
    space = read_space(space_file, preset)
    if any(space.fp8) and options.dtype != "bfloat16":
        raise JetExportError(f"--space {space_file}: precision.fp8 works on a bfloat16 model.", "Leave --dtype out.")
    check_fp8(space, space_file, device)
    sampler = choose_sampler(options.sampler, space, preset, options.trials)
    score = load_score(options.scores)
    bench = Bench(
        machine(device), backend.name, options.dtype, space.prefill_chunk, space.new_tokens, space.repeats, space.fill
    )
    output = options.output or Path("searches") / f"{Path(options.model).name.removesuffix('.json')}-{backend.name}"
    database = options.database or output.parent / "measurements.db"
    jobs = options.jobs or max(1, min(4, (os.cpu_count() or 1) // 2))
    return Search(options, preset, space, space_file, score, sampler, backend, device, bench,
                  Scene(preset, space, torch_dtype(options.dtype), usable_memory(device)), output, database,
                  jobs)  # fmt: skip


RECORD_KEY = "jet_export_search"  # of best.json


def usable_memory(device: torch.device) -> int:
    """Bytes that an engine may take there, as `jet-export inspect` counts them."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.get_device_properties(device).total_memory)
    return available_memory(device)


def check_fp8(space: Space, space_file: Path, device: torch.device) -> None:
    from importlib.util import find_spec

    if not any(space.fp8) and "fp8" not in space.kv_cache_dtype:
        return
    if any(space.fp8) and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise JetExportError(f"--space {space_file}: precision.fp8: this GPU has no FP8 arithmetic.")
    if any(space.fp8) and find_spec("modelopt") is None:
        raise JetExportError(f"--space {space_file}: precision.fp8 needs nvidia-modelopt.",
                             "pip install 'jet-export[fp8]'")  # fmt: skip


def run_search(search: Search, emit: Callable[[str], None], hands: Hands | None = None) -> Search:
    """Sample, measure, choose. Files are written by output.write_results."""
    start = time.monotonic()
    check_output(search.output, search.identity(), search.options.resume)
    refuse_all(search)  # where no point is left, nothing is created
    database = Database(search.database_file)
    open_output(search.output, search.identity())
    workshop = open_workshop(search, database, hands, emit)
    try:
        search_with(search, workshop, emit)
    finally:
        workshop.hands.stop()
    search.seconds = time.monotonic() - start
    return search


def search_with(search: Search, workshop: Workshop, emit: Callable[[str], None]) -> None:
    composer = Composer(workshop, search.preset, search.space)

    def evaluate(points: list[Point]) -> list[Values]:
        return evaluate_points(search, workshop, composer, points)

    identity = hashlib.sha256(json.dumps(search.identity(), sort_keys=True).encode()).hexdigest()[:16]
    sample(
        search.sampler, search.space, search.preset, evaluate, search.output / "study.db", identity,
        search.options.trials or TRIALS, 4 * search.jobs, search.options.seed, lambda: workshop.out_of_time,
    )  # fmt: skip
    finish(search, workshop, composer, emit)


def build_engines(search: Search, emit: Callable[[str], None], hands: Hands | None = None) -> None:
    """Build what a search of an enumerated space measures, and nothing else: the layers and, whole, the --whole points
    of the best scores: the first of them is on the front for certain. Raises JetExportError where an engine fails."""
    if search.sampler != "exact":
        raise JetExportError("--build-only: the points of a sampled space are not known before others are measured.",
                             "Leave it out, or make the space smaller.")  # fmt: skip
    check_output(search.output, search.identity(), resume=True)
    refuse_all(search)
    able = [e for e in search.evaluations.values() if not e.refused and e.score is not None]
    best = sorted(able, key=lambda e: -(e.score or 0.0))[: search.options.whole]
    cells = [whole_cell(e.point, e.config) for e in best if e.config is not None]  # first: they take longest
    cells += [c for e in able for c in cells_of(e.point, search.preset, search.space)]
    workshop = open_workshop(search, Database(search.database_file), hands, emit)
    try:
        built, failed = workshop.build_ahead(cells)
    finally:
        workshop.hands.stop()
    emit(f"built      {built} engines, not measured: the same command without --build-only measures them")
    if failed:
        raise JetExportError(f"{failed} engines could not be built (above).")


def open_workshop(search: Search, database: Database, hands: Hands | None, emit: Callable[[str], None]) -> Workshop:
    s = search.space
    scratch = search.database_file.parent / f"{search.database_file.name}.engines"
    if hands is None:
        hands = Processes(database, search.bench, str(search.device), scratch, max(s.batch),
                          max(s.context) + s.new_tokens, search.jobs, decode_one=min(s.batch) == 1)  # fmt: skip
    timeout = search.options.timeout
    deadline = None if timeout is None else time.monotonic() + timeout
    return Workshop(database, search.bench, hands, search.cases, scratch / "claims", search.jobs, emit, deadline,
                    search.options.keep_engines, doubt(search))  # fmt: skip


def doubt(search: Search) -> Callable[[Cell, Entry], bool]:
    """What --remeasure measures again: what its repeats do not confirm, and the engine without layers, which every sum
    rests on."""
    base = base_cell(search.preset)
    return lambda cell, entry: search.options.remeasure and (cell == base or entry.confirmed is False)


def judge(search: Search, point: Point) -> Evaluation:
    """All that is known of a point before anything is built."""
    if point in search.evaluations:
        return search.evaluations[point]
    e = Evaluation(point, point.label(search.space, search.preset), search.scene.refusal(point))
    search.evaluations[point] = e
    if e.refused is None:
        e.config = point.config(search.preset, search.space)
        e.parameters = parameter_count(e.config)
        e.cache_bytes = search.scene.cache_bytes(e.config, point)
        e.conv_bytes = search.scene.memory(e.config, point, 1).conv_states
        e.score = search.score.of(point, e.config)
    return e


def refuse_all(search: Search) -> None:
    """Judge every point of an enumerated space. Raises JetExportError where none is left, or none has a score."""
    unmatched = search.unmatched
    scored = not search.score.keys or len(unmatched) < len(search.score.keys)
    if search.sampler == "exact":
        judged = [judge(search, p) for p in all_points(search.space, search.preset)]
        if all(e.refused for e in judged):
            raise nothing_left(search, judged)
        scored = any(e.score is not None for e in judged)
    if not scored:
        where = "which is not refused " if unmatched != list(search.score.keys) else ""
        keys = f"; its keys that match no point: {few(unmatched)}" if unmatched else ""
        raise JetExportError(
            f"--scores {search.options.scores}: no point {where}has a score in it{keys}.",
            "A key is a point's sizes, 96x256x12, or its groups', 96x256x12+64x64x4; --dry-run prints the points.",
        )


def few(words: list[str], most: int = 3) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def nothing_left(search: Search, judged: list[Evaluation]) -> JetExportError:
    shown = [f"{e.label}: {e.refused}" for e in judged[:3]]
    more = f" (and {len(judged) - 3} more)" if len(judged) > 3 else ""
    return JetExportError(
        f"--space {search.space_file}: none of the {len(judged)} points can be built. " + "; ".join(shown) + more + ".",
        "Change [jet] sizes or [constraints]; docs/search.md describes both.",
    )


def evaluate_points(search: Search, workshop: Workshop, composer: Composer, points: list[Point]) -> list[Values]:
    judged = [judge(search, p) for p in points]
    able = [e for e in judged if not e.refused and e.score is not None]
    workshop.ensure(c for e in able for c in cells_of(e.point, search.preset, search.space))
    return [values_of(search, workshop, composer, e) for e in judged]


def values_of(search: Search, workshop: Workshop, composer: Composer, e: Evaluation) -> Values:
    if e.refused:
        return e.refused
    if e.score is None:
        e.missed = f"no {search.score.name} known"
        return e.missed
    e.predicted = composer.predict(e.point)
    if e.predicted is None:
        cells = cells_of(e.point, search.preset, search.space)
        e.missed = next((workshop.failed[c] for c in cells if c in workshop.failed), "not measured in the time given")
        return e.missed
    b, c = search.target
    speed = e.tokens_per_s(b, c)
    if math.isnan(speed):
        e.missed = composer.at_odds((b, c, "decode")) or "its layers' latencies sum to nothing: noise"
        return e.missed
    e.missed = missed_target(search, e, e.predicted)
    return e.missed or (speed, e.score)


def missed_target(search: Search, e: Evaluation, latency: Latency) -> str | None:
    """Which target the point misses by these milliseconds, predicted or measured whole."""
    b, c = search.target
    speed, prefill = (e.tokens_per_s(b, c, phase, latency) for phase in ("decode", "prefill"))
    return search.scene.missed_target(latency[b, c, "decode"], speed, prefill)


def finish(search: Search, workshop: Workshop, composer: Composer, emit: Callable[[str], None]) -> None:
    """The front, whole engines of its points, the choice."""
    b, c = search.target
    for e in search.evaluations.values():
        if e.predicted:  # some before all was measured that may speak against it
            values_of(search, workshop, composer, e)
    cases = [(*case, phase) for case in search.cases for phase in PHASES]
    search.at_odds = {case: why for case in cases if (why := composer.at_odds(case))}
    keep_layers(search, composer, [case for case in cases if case not in search.at_odds])
    wanted: list[Evaluation] = []
    while front := pareto(list(search.evaluations.values()), b, c):
        more = build_whole(search, workshop, composer, [e for e in front if e not in wanted], len(wanted), emit)
        wanted += more
        if not any(e.missed for e in more):
            break
    search.failed = workshop.failed
    search.timed_out = out_of_time(search, workshop, wanted)
    if not front:
        raise no_front(search, workshop)
    for e in front:
        e.front = True
    search.noisy = composer.noisy()
    search.filled = {cell: {case: str(e.details.get("filled_by", "")) for case, e in known.items()}
                     for cell, known in workshop.known.items()}  # fmt: skip
    best, search.why = choose(front, b, c, search.space.slack_percent)
    best.chosen = True


def build_whole(
    search: Search, workshop: Workshop, composer: Composer, front: list[Evaluation], before: int,
    emit: Callable[[str], None],
) -> list[Evaluation]:  # fmt: skip
    """Measure points of the front whole, as many as --whole leaves after `before` others; which miss a target then."""
    b, c = search.target
    most = max(0, search.options.whole - before)
    ahead = [e for e in front if e.config is not None and workshop.hands.built(whole_cell(e.point, e.config))]
    wanted = to_build_whole(front, most, b, c, search.space.slack_percent, ahead)
    cells = {whole_cell(e.point, e.config): e for e in wanted if e.config is not None}
    if cells:
        emit(f"building {len(cells)} of {len(front)} points on the front whole")
        workshop.ensure(cells)
    for cell, e in cells.items():
        e.measured = composer.measured(cell)
        if e.measured:
            missed = missed_target(search, e, e.measured)
            e.missed = f"measured whole: {missed}" if missed else None
    return wanted


def out_of_time(search: Search, workshop: Workshop, wanted: list[Evaluation]) -> bool:
    """Whether --timeout left anything out, of the points or of those `wanted` whole."""
    missing = search.sampler != "exact" or any(
        e.predicted is None and not e.refused and e.score is not None for e in search.evaluations.values()
    )
    return workshop.out_of_time and (missing or any(e.measured is None for e in wanted))


def keep_layers(search: Search, composer: Composer, cases: list[tuple[int, int, str]]) -> None:
    """The per-layer table of all points that have one."""
    cells: Counter[Cell] = Counter()
    for e in search.evaluations.values():
        if e.predicted:
            cells.update(layer_cells(e.point, search.preset, search.space).keys())
    for cell in sorted(cells, key=str):
        shares = {case: composer.layer(cell, *case) for case in cases}
        search.layers[cell] = {case: ms for case, ms in shares.items() if ms is not None}
    known = {case: composer.entry(composer.base, case) for case in cases}
    search.base = {case: entry.median_ms for case, entry in known.items() if entry}


def no_front(search: Search, workshop: Workshop) -> JetExportError:
    whole = [e for e in search.evaluations.values() if e.measured]  # all of them missed a target
    if whole:
        said = f"{few([f'{e.label}, {e.missed}' for e in whole])}"
        return JetExportError(f"no point is left: those predicted to meet the targets miss them: {said}.",
                              "Loosen [constraints].")  # fmt: skip
    if workshop.out_of_time:
        return JetExportError(
            f"--timeout {search.options.timeout:g}: no point is measured completely yet; what is measured is kept.",
            "Run the same command with --resume and more time.",
        )
    judged = list(search.evaluations.values())
    if not judged or all(e.refused for e in judged):
        return nothing_left(search, judged)
    reasons = Counter(e.refused or e.missed or "" for e in judged)
    return JetExportError(f"no point is left: {reasons.most_common(1)[0][0]} ({len(judged)} points).",
                          "Loosen [constraints], or look at the failures above.")  # fmt: skip


def plan_lines(search: Search) -> list[str]:
    """What the search is about to do, before any work."""
    s = search.space
    b, c = search.target
    points = count_points(s, search.preset)
    grid = f"batch {', '.join(map(str, s.batch))} x context {', '.join(map(str, s.context))}"
    lines = [
        f"model      {search.options.model}: {parameter_count(search.preset) / 1e6:,.1f} M parameters",
        f"space      {search.space_file}: {points:,} points, looked at by {search.sampler}",
        f"score      {search.score.name} ({search.score.source})",
        *([f"           keys that match no point: {few(search.unmatched)}"] if search.unmatched else []),
        f"device     {search.bench.machine['device']}; backend {search.backend.name} ({search.backend.reason})",
        f"measured   {grid}, decode and prefill in chunks of {s.prefill_chunk}; target batch {b}, context {c}",
        f"database   {search.database_file}",
        f"output     {search.output}",
    ]
    if search.sampler == "exact":
        judged = [judge(search, p) for p in all_points(s, search.preset)]
        able = [e for e in judged if not e.refused and e.score is not None]
        cells = {cell for e in able for cell in cells_of(e.point, search.preset, s)}
        lines.insert(2, f"engines    {len(cells)} of layers for {len(able)} points, {search.jobs} built at a time")
        lines += [f"refused    {e.label}: {e.refused}" for e in judged if e.refused]
    bound = search.scene.allowed_cache_bytes(next(iter(all_points(s, search.preset)))) if points else None
    if s.cache_bytes == "preset" and bound is not None:
        lines.append(f"cache      at most the preset's at the same precision: {human(bound)} a sequence at first")
    return lines


def options_record(search: Search) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(search.options).items()}
