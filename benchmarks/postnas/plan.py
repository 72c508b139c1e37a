"""The plan of the run: its pieces in order, what each costs, and what is left at the speed that was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jet_export.postnas.blocks import FORMS
from jet_export.postnas.recipe import BudgetRecipe, PostnasRecipe
from jet_export.training.recipe import Recipe

# Tokens a second of training on one H200 that the plan assumes, by phase; README.md has those seen. jet-tiny (5.4 M
# parameters, 7 layers, compiled) trained at 1.46 M there. Model FLOPs are 3 x 2 x 6.9 M a token of the teacher: 0.7 M
# tokens/s are 29 TFLOP/s, an MFU of 3 %. Models this small wait for launches, and torch's recurrence for its chunks.
SPEEDS = {"teacher": 700e3, "supernet": 350e3, "candidate": 400e3, "torch": 80e3, "retrofit": 350e3}
START = 4.0  # seconds of a training: models, streams, the checkpoint, and scoring of its result
PATH = 0.4  # of scoring a path of the supernet by all tasks
SIDE_BY_SIDE = ("candidate", "block")  # phases whose trainings --parallel runs so
CALL = 45.0  # of a call: imports, data, and what a bare machine compiles


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`seconds`: assumed. `unit`: of its smallest part that a later call does not have to repeat. `needs`: pieces."""

    name: str
    phase: str
    what: str
    seconds: float
    unit: float
    needs: tuple[str, ...] = ()


def plan(recipe: PostnasRecipe, teacher: Recipe, layers: int, seeds: int) -> list[Piece]:
    """In order. A later piece runs first where it fits the time that is left and the earlier one does not."""
    rate = recipe.training.tokens_per_step
    p, stages = recipe.placement, [f"teacher-{i + 1}" for i in range(len(teacher.stage))]
    out = [
        _piece(
            name, "teacher", f"{n:,} steps of {teacher.tokens_per_step:,} tokens", n * teacher.tokens_per_step,
            needs=tuple(stages[:i]),
        )
        for i, (name, n) in enumerate(zip(stages, map(teacher.steps_of, teacher.stage), strict=True))
    ]  # fmt: skip
    trained = (stages[-1],)
    grown = sum(recipe.placement.beam * (layers - i) for i in range(1, max(p.keep)))
    paths = layers + 1 + (1 + len(recipe.task)) * grown  # at most: objectives share many
    budget, kept = recipe.block, [k for k in p.keep if k]
    one = START + rate * _steps(budget) / SPEEDS["candidate"]
    supernet = _piece(
        "placement", "supernet", f"supernet, {p.steps:,} steps; up to {paths} paths scored", rate * p.steps
    )
    out.append(_with(supernet, paths * PATH, trained))
    compared = sum(4 * (seeds - (k == 1)) for k in kept)  # at most: methods share placements; truth has k = 1, seed 0
    out += [
        _many("truth", "every placement of one attention layer", layers, one, ("placement",)),
        _many("compare", f"learned, uniform, restore-one KL; k = {kept}; {seeds} seeds", compared, one, ("truth",)),
    ]
    s = recipe.shapes
    more = (
        rate
        * s.logits_steps
        * sum((len(s.sizes) // s.eta**r) * (s.eta**r - s.eta ** (r - 1)) for r in range(1, s.rungs))
    )
    sizes = _many("shapes", f"{len(s.sizes)} sizes, {s.rungs} rungs", len(s.sizes), one, ("placement",))
    out.append(_with(sizes, more / SPEEDS["candidate"] + 2 * START, sizes.needs, sizes.unit))
    steps = sum(map(recipe.training.steps_of, recipe.training.stage))
    out.append(_piece("retrofit", "retrofit", f"the chosen model, {steps:,} steps", rate * steps, needs=("shapes",)))
    out += [
        Piece(name="models", phase="models", what="teacher, chosen model, jet-tiny on all held-out data",
              seconds=45, unit=45, needs=("retrofit",)),
        Piece(name="engine", phase="engine", what="build, verify, bench", seconds=330, unit=330, needs=("retrofit",)),
    ]  # fmt: skip
    slow = START + rate * _steps(budget) / SPEEDS["torch"]
    forms = [name in FORMS for name in budget.blocks]
    blocks = one * sum(forms) + slow * (len(forms) - sum(forms))
    what = f"{len(forms)} blocks, {len(forms) - sum(forms)} of them in torch"
    out.append(Piece(name="block", phase="block", what=what, seconds=blocks, unit=slow, needs=("placement",)))
    out.append(_many("design", "the JetBlock's choices", len(recipe.design.variants), one, ("placement",)))
    return out


def _steps(budget: BudgetRecipe) -> int:
    return budget.feature_steps + budget.logits_steps


def _piece(name: str, phase: str, what: str, tokens: float, needs: tuple[str, ...] = ()) -> Piece:
    seconds = START + tokens / SPEEDS[phase]
    return Piece(name=name, phase=phase, what=what, seconds=seconds, unit=seconds, needs=needs)


def _with(piece: Piece, more: float, needs: tuple[str, ...], unit: float | None = None) -> Piece:
    seconds = piece.seconds + more
    return Piece(
        name=piece.name, phase=piece.phase, what=piece.what, seconds=seconds, unit=unit or piece.seconds, needs=needs
    )


def _many(name: str, what: str, count: int, one: float, needs: tuple[str, ...]) -> Piece:
    return Piece(
        name=name,
        phase="candidate",
        what=f"{what}: {count} short retrofits",
        seconds=count * one,
        unit=one,
        needs=needs,
    )


def smallest(piece: Piece, longer: float, parallel: int, seen: bool) -> float:
    """Seconds of a piece's smallest part. Where pieces have been `seen` side by side, `longer` is of all trainings
    together, and each of them took `parallel` times that."""
    return piece.unit * longer * (parallel if seen and piece.phase in SIDE_BY_SIDE else 1)


def ratios(pieces: Iterable[Piece], seconds: dict[str, float], done: Iterable[str]) -> Callable[[Piece], float]:
    """Of a piece: by how much it takes longer than assumed, as its phase's finished pieces did; where there is none,
    as all finished ones did."""
    known, finished = list(pieces), set(done)

    def of(some: list[Piece]) -> float | None:
        assumed = sum(p.seconds for p in some)
        return sum(seconds.get(p.name, 0.0) for p in some) / assumed if assumed else None

    ended = [p for p in known if p.name in finished]
    overall = of(ended) or 1.0
    return lambda piece: of([p for p in ended if p.phase == piece.phase]) or overall
