"""Which points are looked at: every one where the space is small, or those that an Optuna sampler asks for.

Optuna maximises tokens/s at the target and the score together; its study is kept in SQLite, and goes on where it
stopped. Refused points and points without a score end as failed trials, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jet_export.model.config import JetNemotronConfig
from jet_export.search.points import Point, all_points, canonical, count_points, feasible, used_groups
from jet_export.search.space import Counts, Space
from jet_export.utils.errors import JetExportError

EXACT = 4096  # points up to which a space is enumerated
SAMPLERS = ("auto", "exact", "grid", "tpe", "nsga2")
TRIALS = 200
Values = tuple[float, float] | str  # tokens/s and score, or why there are none


def choose_sampler(asked: str, space: Space, preset: JetNemotronConfig, trials: int | None) -> str:
    """`auto`: exact where the space is small. Raises JetExportError for a sampler that does not fit the space."""
    if asked not in SAMPLERS:
        raise JetExportError(f"--sampler {asked}: not known.", f"Known: {', '.join(SAMPLERS)}.")
    points = count_points(space, preset)
    if asked == "auto":
        asked = "exact" if points <= (EXACT if trials is None else min(EXACT, trials)) else "tpe"
    if asked == "exact" and points > EXACT:
        raise JetExportError(f"--sampler exact: the space has {points:,} points.", "Take tpe or nsga2 with --trials N.")
    if asked == "grid" and isinstance(space.layouts, Counts):
        raise JetExportError("--sampler grid: cannot search layouts under a count.", "Take tpe or nsga2, or list them.")
    if asked != "exact":
        require_optuna()
    return asked


def require_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise JetExportError(
            "this space needs Optuna, which is not installed.", "pip install 'jet-export[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def axes(space: Space) -> dict[str, list[Any]]:
    """Every categorical choice by its name; searched layouts have none."""
    sizes = [str(d) for d in space.sizes]
    groups: Iterable[int] = range(space.groups)
    if not isinstance(space.layouts, Counts):
        groups = sorted({g for layout in space.layouts for g in used_groups(layout, space)})
    out: dict[str, list[Any]] = {f"sizes_{g}": sizes for g in groups}
    out |= {"window_size": list(space.window_size), "fp8": list(space.fp8)}
    out |= {"state_dtype": list(space.state_dtype), "kv_cache_dtype": list(space.kv_cache_dtype)}
    return out if isinstance(space.layouts, Counts) else {**out, "layout": list(space.layouts)}


def suggest(trial: Any, space: Space, layers: int) -> Point:
    """The point that a trial asks for. A searched layout: a weight a layer, the largest ones are attn, then swa."""
    choice = {name: trial.suggest_categorical(name, values) for name, values in axes(space).items()}
    if isinstance(space.layouts, Counts):
        pairs = {f"{a} attn, {s} swa": (a, s) for a, s in feasible(space.layouts, layers)}
        attn, swa = pairs[trial.suggest_categorical("layers", list(pairs))]
        weights = [trial.suggest_float(f"place_{i}", 0.0, 1.0) for i in range(layers)]
        order = sorted(range(layers), key=lambda i: -weights[i])
        a, s = order[:attn], order[attn : attn + swa]
        choice["layout"] = "".join("a" if i in a else "s" if i in s else "j" for i in range(layers))
    by_name = {str(d): d for d in space.sizes}
    sizes = tuple(by_name[choice[f"sizes_{g}"]] for g in used_groups(choice["layout"], space))
    rest = (choice[k] for k in ("layout", "window_size", "fp8", "state_dtype", "kv_cache_dtype"))
    return canonical(Point(sizes, *rest), space)


def sample(
    sampler: str, space: Space, preset: JetNemotronConfig, evaluate: Callable[[list[Point]], list[Values]],
    study_file: Path, name: str, trials: int, batch: int, seed: int, stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Hand points to `evaluate`: all at once, or `batch` trials a time until there are `trials` in the study."""
    if sampler == "exact":
        evaluate(list(all_points(space, preset)))
        return
    study = open_study(sampler, space, study_file, name, seed)
    grid = sampler == "grid"
    replay(study, space, preset, evaluate)
    while (left := trials - len(looked_at(study))) > 0 and not stop():
        if grid and study.sampler.is_exhausted(study):
            break
        asked = [study.ask() for _ in range(1 if grid else min(batch, left))]
        points = [suggest(t, space, preset.num_hidden_layers) for t in asked]
        for trial, values in zip(asked, evaluate(points), strict=True):
            tell(study, trial, values)


def tell(study: Any, trial: Any, values: Values) -> None:
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


def looked_at(study: Any) -> list[Any]:
    """The trials that came to an end of their own: with values, or refused."""
    return [t for t in study.get_trials(deepcopy=False) if t.values or "refused" in t.user_attrs]


def replay(
    study: Any, space: Space, preset: JetNemotronConfig, evaluate: Callable[[list[Point]], list[Values]]
) -> None:
    """Look again at what earlier runs looked at (it is measured), and ask again for what a kill left open."""
    from optuna.trial import FixedTrial, TrialState

    points = [suggest(FixedTrial(t.params), space, preset.num_hidden_layers) for t in looked_at(study)]
    if points:
        evaluate(list(dict.fromkeys(points)))
    for t in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(t.number, state=TrialState.FAIL)
        study.enqueue_trial(t.params)


def open_study(sampler: str, space: Space, study_file: Path, name: str, seed: int) -> Any:
    """A resumed study's sampler has a seed of its own: it would ask for its first points again."""
    optuna = require_optuna()
    samplers = {
        "grid": lambda seed: optuna.samplers.GridSampler(axes(space), seed=seed),
        "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
        "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=24),
    }
    try:
        study = optuna.create_study(storage=f"sqlite:///{study_file}", study_name=name,
                                    directions=["maximize", "maximize"], load_if_exists=True)  # fmt: skip
        study.sampler = samplers[sampler](seed + len(study.get_trials(deepcopy=False)))
    except Exception as e:  # SQLAlchemy's and Optuna's own kinds
        first = str(e).strip().splitlines()[0] if str(e) else type(e).__name__
        raise JetExportError(
            f"{study_file}: not a usable Optuna study ({first}).", f"Move it away: mv {study_file} {study_file}.bad"
        ) from None
    return study
