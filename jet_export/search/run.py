"""Runs a search: samples points, measures their layers, builds the best of the front whole, and chooses."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jet_export.search.cells import Cell, base_cell, layer_cells, whole_cell
from jet_export.search.database import Database, Entry, Latencies, Metric
from jet_export.search.directory import check_output, open_output
from jet_export.search.evaluation import Evaluation
from jet_export.search.executor import Executor, SubprocessExecutor
from jet_export.search.measurer import Measurer
from jet_export.search.points import Point, all_points
from jet_export.search.predict import Predictor
from jet_export.search.ray_cluster import RayCluster
from jet_export.search.ray_executor import RayExecutor
from jet_export.search.sampling import DEFAULT_TRIALS, Values
from jet_export.search.search import Search, shortened
from jet_export.search.spec import SearchSpec
from jet_export.utils.errors import JetExportError

Emit = Callable[[str], None]


def run_search(search: Search, emit: Emit, executor: Executor | None = None, cluster: RayCluster | None = None) -> None:
    """Fill in the search's state, on this machine or a cluster. Raises JetExportError if no point is left to choose."""
    start = time.monotonic()
    spec = search.spec
    check_output(spec.output, spec.identity(), spec.options.resume)
    search.require_points()  # before anything is created
    database = Database(spec.database_file)
    open_output(spec.output, spec.identity())
    measurer = open_measurer(spec, database, emit, executor, cluster)
    try:
        SearchRun(search, measurer, Predictor(measurer, spec.preset, spec.space), emit).run()
    finally:
        measurer.executor.stop()
    search.state.seconds = time.monotonic() - start


def build_engines(
    search: Search, emit: Emit, executor: Executor | None = None, cluster: RayCluster | None = None
) -> None:
    """Build all engines that a search of an enumerated space measures, and measure none.

    Of the points built whole only the --whole ones with the best scores are known: the first of them is on the front
    for certain. Raises JetExportError if an engine fails.
    """
    spec = search.spec
    if spec.sampler != "exact":
        raise JetExportError(
            "--build-only: the points of a sampled space are not known before others are measured.",
            "Leave it out, or make the space smaller.",
        )
    check_output(spec.output, spec.identity(), resume=True)
    search.require_points()
    points = [e for e in search.state.evaluations.values() if e.buildable]
    best = sorted(points, key=lambda e: -(e.score or 0.0))[: spec.options.whole]
    cells = [whole_cell(e.point, e.config) for e in best if e.config is not None]  # first: they take longest
    cells += [c for e in points for c in search.cells_of(e.point)]
    measurer = open_measurer(spec, Database(spec.database_file), emit, executor, cluster)
    try:
        built, failed = measurer.build_only(cells)
    finally:
        measurer.executor.stop()
    emit(f"built      {built} engines, not measured: the same command without --build-only measures them")
    if failed:
        raise JetExportError(f"{failed} engines could not be built (above).")


def open_measurer(
    spec: SearchSpec, database: Database, emit: Emit, executor: Executor | None, cluster: RayCluster | None
) -> Measurer:
    directory = spec.database_file.parent / f"{spec.database_file.name}.engines"
    if executor is None:
        make = SubprocessExecutor if cluster is None else partial(RayExecutor, cluster=cluster)
        executor = make(
            database=database,
            setup=spec.setup,
            device=spec.host.device,
            directory=directory,
            max_batch_size=max(spec.space.batch),
            max_seq_len=max(spec.space.context) + spec.space.new_tokens,
            jobs=spec.jobs,
            decode_one=min(spec.space.batch) == 1,
        )
    timeout = spec.options.timeout
    return Measurer(
        database=database,
        setup=spec.setup,
        executor=executor,
        cases=spec.cases,
        claims=directory / "claims",
        jobs=spec.jobs,
        devices=1 if cluster is None else cluster.slots()[1],
        emit=emit,
        deadline=None if timeout is None else time.monotonic() + timeout,
        keep_engines=spec.options.keep_engines,
        outdated=outdated_entries(spec),
    )


def outdated_entries(spec: SearchSpec) -> Callable[[Cell, Entry], bool]:
    """With --remeasure: entries whose repeats disagree, and the engine without layers, on which every sum rests."""
    base = base_cell(spec.preset)
    return lambda cell, entry: spec.options.remeasure and (cell == base or entry.confirmed is False)


@dataclass
class SearchRun:
    search: Search
    measurer: Measurer
    predictor: Predictor
    emit: Emit

    def run(self) -> None:
        self.sample()
        self.predict_all()
        front = self.find_front()
        for e in front:
            e.front = True
        best, self.search.state.reason = self.search.spec.selector.choose(front)
        best.chosen = True

    def sample(self) -> None:
        spec = self.search.spec
        if spec.sampler == "exact":
            self.evaluate(list(all_points(spec.space, spec.preset)))
            return
        spec.study.sample(
            self.evaluate,
            trials=spec.options.trials or DEFAULT_TRIALS,
            batch=4 * spec.jobs,
            stop=lambda: self.measurer.out_of_time,
        )

    def evaluate(self, points: list[Point]) -> list[Values]:
        """Measure the points' layers; their predicted throughput and their score."""
        evaluations = [self.search.assess(p) for p in points]
        self.measurer.ensure(c for e in evaluations if e.buildable for c in self.search.cells_of(e.point))
        return [self.values(e) for e in evaluations]

    def values(self, e: Evaluation) -> Values:
        """Predict from what is measured; sets `predicted` and `missed`."""
        if e.refused:
            return e.refused
        if e.score is None:
            e.missed = f"no {self.search.spec.score.name} known"
            return e.missed
        e.predicted = self.predictor.predict(e.point)
        e.missed = self.unpredicted(e) if e.predicted is None else self.missed_as_predicted(e, e.predicted)
        return e.missed or (e.tokens_per_s(*self.search.spec.target), e.score)

    def unpredicted(self, e: Evaluation) -> str:
        """Why there is no prediction."""
        failed = self.measurer.failed
        reasons = (failed[c] for c in self.search.cells_of(e.point) if c in failed)
        return next(reasons, "not measured in the time given")

    def missed_as_predicted(self, e: Evaluation, predicted: Latencies) -> str | None:
        target = self.search.spec.target
        if math.isnan(e.tokens_per_s(*target)):
            inconsistency = self.predictor.inconsistency((*target, "decode"))
            return inconsistency or "its layers' latencies sum to nothing: noise"
        return self.missed_target(e, predicted)

    def missed_target(self, e: Evaluation, latencies: Latencies) -> str | None:
        """Which target the point misses with these latencies, predicted or measured."""
        spec = self.search.spec
        return spec.constraints.missed_target(
            decode_ms=latencies[(*spec.target, "decode")],
            tokens_per_s=e.tokens_per_s(*spec.target, "decode", latencies),
            prefill_tokens_per_s=e.tokens_per_s(*spec.target, "prefill", latencies),
        )

    def predict_all(self) -> None:
        """Predict every point again, since later measurements may have shown a metric to be inconsistent."""
        state = self.search.state
        for e in state.evaluations.values():
            if e.predicted:
                self.values(e)
        found = {metric: self.predictor.inconsistency(metric) for metric in self.predictor.metrics}
        state.inconsistent = {metric: why for metric, why in found.items() if why}
        self.record_layers([metric for metric in self.predictor.metrics if metric not in state.inconsistent])

    def record_layers(self, metrics: list[Metric]) -> None:
        """What a layer adds, for every cell of a predicted point."""
        spec, state = self.search.spec, self.search.state
        predicted = [e for e in state.evaluations.values() if e.predicted]
        cells = [cell for e in predicted for cell in layer_cells(e.point, spec.preset, spec.space)]
        for cell in sorted(dict.fromkeys(cells), key=str):
            added = {metric: self.predictor.layer(cell, metric) for metric in metrics}
            state.layers[cell] = {metric: ms for metric, ms in added.items() if ms is not None}
        base = {metric: self.predictor.entry(self.predictor.base, metric) for metric in metrics}
        state.base = {metric: entry.median_ms for metric, entry in base.items() if entry}

    def find_front(self) -> list[Evaluation]:
        """The Pareto front, after the points measured whole that miss a target have left it."""
        spec, state = self.search.spec, self.search.state
        whole: list[Evaluation] = []
        while front := spec.selector.pareto(list(state.evaluations.values())):
            more = self.measure_whole([e for e in front if e not in whole], spec.options.whole - len(whole))
            whole += more
            if not any(e.missed for e in more):
                break
        state.failed = self.measurer.failed
        state.timed_out = self.left_unmeasured(whole)
        if not front:
            raise self.empty_front()
        state.noisy, state.repeated = self.predictor.count_noisy()
        state.filled_by = {
            cell: {metric: str(e.details.get("filled_by", "")) for metric, e in entries.items()}
            for cell, entries in self.measurer.known.items()
        }
        return front

    def measure_whole(self, front: list[Evaluation], most: int) -> list[Evaluation]:
        """Build and measure up to `most` points of the front whole; sets `measured` and `missed`."""
        cells = {id(e): whole_cell(e.point, e.config) for e in front if e.config is not None}
        built = [e for e in front if id(e) in cells and self.measurer.executor.built(cells[id(e)])]
        chosen = self.search.spec.selector.to_build_whole(front, max(0, most), built)
        if chosen:
            self.emit(f"building {len(chosen)} of {len(front)} points on the front whole")
            self.measurer.ensure(cells[id(e)] for e in chosen)
        for e in chosen:
            e.measured = self.predictor.measured(cells[id(e)])
            if e.measured:
                missed = self.missed_target(e, e.measured)
                e.missed = f"measured whole: {missed}" if missed else None
        return chosen

    def left_unmeasured(self, whole: list[Evaluation]) -> bool:
        """Whether --timeout left out any of the points, or of those to measure `whole`."""
        evaluations = self.search.state.evaluations.values()
        sampled = self.search.spec.sampler != "exact"
        missing = sampled or any(e.predicted is None and e.buildable for e in evaluations)
        return self.measurer.out_of_time and (missing or any(e.measured is None for e in whole))

    def empty_front(self) -> JetExportError:
        """Why no point is left."""
        evaluations = list(self.search.state.evaluations.values())
        whole = [f"{e.label}, {e.missed}" for e in evaluations if e.measured]  # all of them missed a target
        if whole:
            return JetExportError(
                f"no point is left: those predicted to meet the targets miss them: {shortened(whole)}.",
                "Loosen [constraints].",
            )
        if self.measurer.out_of_time:
            return JetExportError(
                f"--timeout {self.search.spec.options.timeout:g}: no point is measured completely yet; what is "
                "measured is kept.",
                "Run the same command with --resume and more time.",
            )
        if all(e.refused for e in evaluations):
            return self.search.all_refused(evaluations)
        reasons = Counter(e.refused or e.missed or "" for e in evaluations)
        return JetExportError(
            f"no point is left: {reasons.most_common(1)[0][0]} ({len(evaluations)} points).",
            "Loosen [constraints], or look at the failures above.",
        )
