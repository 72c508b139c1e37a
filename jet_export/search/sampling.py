"""Which points a search looks at: all of a small space, or those that an Optuna sampler proposes.

Optuna maximises tokens/s at the target and the score together. Its study is kept in SQLite and can be resumed. Refused
points and points without a score are failed trials, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_export.model.config import JetNemotronConfig
from jet_export.search.points import Point, canonical, count_points, feasible_counts, used_groups
from jet_export.search.space import LayerCounts, Space
from jet_export.utils.errors import JetExportError

MAX_EXACT_POINTS = 4096  # above which a space is sampled
SAMPLERS = ("auto", "exact", "grid", "tpe", "nsga2")
DEFAULT_TRIALS = 200

Values = tuple[float, float] | str  # tokens/s and score, or why there are none
Evaluate = Callable[[list[Point]], list[Values]]


def choose_sampler(requested: str, space: Space, preset: JetNemotronConfig, trials: int | None) -> str:
    """`auto`: exact if the space is small. Raises JetExportError for a sampler that does not fit the space."""
    if requested not in SAMPLERS:
        raise JetExportError(f"--sampler {requested}: not known.", f"Known: {', '.join(SAMPLERS)}.")
    points = count_points(space, preset)
    if requested == "auto":
        most = MAX_EXACT_POINTS if trials is None else min(MAX_EXACT_POINTS, trials)
        requested = "exact" if points <= most else "tpe"
    if requested == "exact" and points > MAX_EXACT_POINTS:
        raise JetExportError(f"--sampler exact: the space has {points:,} points.", "Take tpe or nsga2 with --trials N.")
    if requested == "grid" and isinstance(space.layouts, LayerCounts):
        raise JetExportError("--sampler grid: cannot search layouts under a count.", "Take tpe or nsga2, or list them.")
    if requested != "exact":
        import_optuna()
    return requested


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise JetExportError(
            "this space needs Optuna, which is not installed.", "pip install 'jet-export[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def without_password(url: str) -> str:
    """A database's URL as it may be shown."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", url)


@dataclass(frozen=True, kw_only=True)
class Study:
    """An Optuna study of a space, in a SQLite file, or in the database `storage`, where several searches share it."""

    sampler: str
    space: Space
    preset: JetNemotronConfig
    file: Path
    name: str  # in the file
    seed: int
    storage: str | None = None  # SQLAlchemy's URL, e.g. postgresql://user:password@host/database

    @property
    def where(self) -> str:
        return without_password(self.storage) if self.storage else str(self.file)

    def open(self) -> Any:
        """Create or load it. A resumed study gets another seed: with the same one it would propose the same points."""
        optuna = import_optuna()
        samplers = {
            "grid": lambda seed: optuna.samplers.GridSampler(self.axes(), seed=seed),
            "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
            "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=24),
        }
        try:
            study = optuna.create_study(
                storage=self.storage or f"sqlite:///{self.file}",
                study_name=self.name,
                directions=["maximize", "maximize"],
                load_if_exists=True,
            )
            study.sampler = samplers[self.sampler](self.seed + len(study.get_trials(deepcopy=False)))
        except Exception as e:  # SQLAlchemy's and Optuna's own kinds
            first = str(e).strip().splitlines()[0] if str(e) else type(e).__name__
            remedy = f"Move it away: mv {self.file} {self.file}.bad"
            if self.storage:
                first, remedy = first.replace(self.storage, self.where), "Is the server up, and its driver installed?"
            raise JetExportError(f"{self.where}: not a usable Optuna study ({first}).", remedy) from None
        return study

    def sample(self, evaluate: Evaluate, *, trials: int, batch: int, stop: Callable[[], bool]) -> None:
        """Evaluate up to `batch` proposed points at a time, until the study has `trials` trials or `stop()`."""
        study = self.open()
        grid = self.sampler == "grid"
        self.replay(study, evaluate)
        while (left := trials - len(completed(study))) > 0 and not stop():
            if grid and study.sampler.is_exhausted(study):
                break
            asked = [study.ask() for _ in range(1 if grid else min(batch, left))]
            for trial, values in zip(asked, evaluate([self.suggest(t) for t in asked]), strict=True):
                record(study, trial, values)

    def replay(self, study: Any, evaluate: Evaluate) -> None:
        """Evaluate again the points of earlier runs, whose latencies are known, and repeat what a kill interrupted."""
        from optuna.trial import FixedTrial, TrialState

        points = [self.suggest(FixedTrial(t.params)) for t in completed(study)]
        if points:
            evaluate(list(dict.fromkeys(points)))
        if self.storage:  # those that run are other searches'
            return
        for t in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(t.number, state=TrialState.FAIL)
            study.enqueue_trial(t.params)

    def axes(self) -> dict[str, list[Any]]:
        """Every categorical choice by its name; layouts under a count are none."""
        space = self.space
        sizes = [str(d) for d in space.sizes]
        groups: Iterable[int] = range(space.groups)
        if not isinstance(space.layouts, LayerCounts):
            groups = sorted({g for layout in space.layouts for g in used_groups(layout, space)})
        axes: dict[str, list[Any]] = {f"sizes_{g}": sizes for g in groups}
        axes |= {"window_size": list(space.window_size), "fp8": list(space.fp8)}
        axes |= {"state_dtype": list(space.state_dtype), "kv_cache_dtype": list(space.kv_cache_dtype)}
        axes |= {"key_heads": list(space.key_heads)} if len(space.key_heads) > 1 else {}
        return axes if isinstance(space.layouts, LayerCounts) else {**axes, "layout": list(space.layouts)}

    def suggest(self, trial: Any) -> Point:
        """The point that a trial proposes."""
        choice = {name: trial.suggest_categorical(name, values) for name, values in self.axes().items()}
        if isinstance(self.space.layouts, LayerCounts):
            choice["layout"] = suggest_layout(trial, self.space.layouts, self.preset.num_hidden_layers)
        by_name = {str(d): d for d in self.space.sizes}
        point = Point(
            sizes=tuple(by_name[choice[f"sizes_{g}"]] for g in used_groups(choice["layout"], self.space)),
            layout=choice["layout"],
            window_size=choice["window_size"],
            fp8=choice["fp8"],
            state_dtype=choice["state_dtype"],
            kv_cache_dtype=choice["kv_cache_dtype"],
            key_heads=choice.get("key_heads", self.space.key_heads[0]),
        )
        return canonical(point, self.space)


def suggest_layout(trial: Any, counts: LayerCounts, layers: int) -> str:
    """Each layer has a weight: the largest ones become attn, the next swa."""
    pairs = {f"{a} attn, {s} swa": (a, s) for a, s in feasible_counts(counts, layers)}
    attn, swa = pairs[trial.suggest_categorical("layers", list(pairs))]
    weights = [trial.suggest_float(f"place_{i}", 0.0, 1.0) for i in range(layers)]
    order = sorted(range(layers), key=lambda i: -weights[i])
    a, s = order[:attn], order[attn : attn + swa]
    return "".join("a" if i in a else "s" if i in s else "j" for i in range(layers))


def record(study: Any, trial: Any, values: Values) -> None:
    from optuna.trial import TrialState

    try:
        if isinstance(values, str):
            trial.set_user_attr("refused", values)
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, values)
    except RuntimeError:  # GridSampler stops the study after its last trial, which ask-and-tell has no loop for
        if trial.number not in {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}:
            raise


def completed(study: Any) -> list[Any]:
    """Trials that a kill did not interrupt: with values, or refused."""
    return [t for t in study.get_trials(deepcopy=False) if t.values or "refused" in t.user_attrs]
