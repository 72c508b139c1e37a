"""A search: its specification, its state, and what is known of its points before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from jet_export.bundle.memory import parameter_count
from jet_export.search.cells import Cell, cells_of
from jet_export.search.evaluation import Evaluation
from jet_export.search.points import Point, all_points
from jet_export.search.spec import SearchSpec
from jet_export.search.state import SearchState
from jet_export.utils.errors import JetExportError


@dataclass
class Search:
    spec: SearchSpec
    state: SearchState = field(default_factory=SearchState)

    @property
    def chosen(self) -> Evaluation | None:
        return next((e for e in self.state.evaluations.values() if e.chosen), None)

    @property
    def front(self) -> list[Evaluation]:
        """The Pareto front, fastest first."""
        front = [e for e in self.state.evaluations.values() if e.front]
        return sorted(front, key=lambda e: -e.tokens_per_s(*self.spec.target))

    def cells_of(self, point: Point) -> list[Cell]:
        """The cells that a prediction of the point needs."""
        return cells_of(point, self.spec.preset, self.spec.space)

    def assess(self, point: Point) -> Evaluation:
        """All that is known of a point before anything is built."""
        spec, known = self.spec, self.state.evaluations
        if point in known:
            return known[point]
        e = Evaluation(
            point=point,
            label=point.label(spec.space, spec.preset),
            refused=spec.constraints.refusal(point),
        )
        known[point] = e
        if e.refused is None:
            e.config = point.config(spec.preset, spec.space)
            e.parameters = parameter_count(e.config)
            e.cache_bytes = spec.constraints.cache_bytes(e.config, point)
            e.conv_bytes = spec.constraints.memory(e.config, point, batch=1).conv_states
            e.score = spec.score.of(point, e.config)
        return e

    def assess_all(self) -> list[Evaluation]:
        """Every point of an enumerated space."""
        return [self.assess(p) for p in all_points(self.spec.space, self.spec.preset)]

    def require_points(self) -> None:
        """Raises JetExportError if every point of an enumerated space is refused, or no point has a score."""
        spec, unmatched = self.spec, self.spec.unmatched_scores
        scored = not spec.score.keys or len(unmatched) < len(spec.score.keys)
        if spec.sampler == "exact":
            assessed = self.assess_all()
            if all(e.refused for e in assessed):
                raise self.all_refused(assessed)
            scored = any(e.score is not None for e in assessed)
        if not scored:
            where = "which is not refused " if unmatched != list(spec.score.keys) else ""
            keys = f"; its keys that match no point: {shortened(unmatched)}" if unmatched else ""
            raise JetExportError(
                f"--scores {spec.options.scores}: no point {where}has a score in it{keys}.",
                "A key is a point's sizes, 96x256x12, or its groups', 96x256x12+64x64x4; --dry-run prints the points.",
            )

    def all_refused(self, evaluations: list[Evaluation]) -> JetExportError:
        shown = [f"{e.label}: {e.refused}" for e in evaluations[:3]]
        more = f" (and {len(evaluations) - 3} more)" if len(evaluations) > 3 else ""
        return JetExportError(
            f"--space {self.spec.space_file}: none of the {len(evaluations)} points can be built. "
            f"{'; '.join(shown)}{more}.",
            "Change [jet] sizes or [constraints]; docs/guides/search.md describes both.",
        )


def shortened(words: list[str], most: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
