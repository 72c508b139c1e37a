"""The Pareto front of throughput against score, the points of it to build whole, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

from jet_export.search.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Compares points by their score and their decode throughput at the target batch and context."""

    batch: int
    context: int
    slack_percent: float  # throughput that a better score may cost

    def predicted_speed(self, e: Evaluation) -> float:
        return e.tokens_per_s(self.batch, self.context)

    def measured_speed(self, e: Evaluation) -> float:
        return e.tokens_per_s(self.batch, self.context, latencies=e.measured)

    def pareto(self, evaluations: list[Evaluation]) -> list[Evaluation]:
        """Points that no other beats in throughput and score together, fastest first."""
        candidates = [e for e in evaluations if e.predicted and e.score is not None and not e.missed]
        candidates.sort(key=lambda e: (-self.predicted_speed(e), -(e.score or 0.0)))
        front: list[Evaluation] = []
        for e in candidates:
            assert e.score is not None
            if not front or e.score > max(f.score or 0.0 for f in front):
                front.append(e)
        return front

    def choose(self, front: list[Evaluation]) -> tuple[Evaluation, str]:
        """The best score within the slack of the fastest, and why. Of the points measured whole if any are."""
        whole = [e for e in front if e.measured]
        if not whole:
            best, why = self.best_predicted(front)
            return best, f"{why}; predicted from its layers: {self.predicted_speed(best):,.0f} tokens/s"
        best, why = self.best_measured(whole)
        if len(whole) < len(front):
            predicted_best, predicted_why = self.best_predicted(front)
            if predicted_best is best:
                why = predicted_why
            else:
                why += f", of those measured whole ({len(whole)} of the {len(front)} on the front)"
        return best, f"{why}; measured whole: {self.measured_speed(best):,.0f} tokens/s"

    def best_measured(self, points: list[Evaluation]) -> tuple[Evaluation, str]:
        speeds = [self.measured_speed(e) for e in points]
        return self.best_score(points, speeds, "that are within")

    def best_predicted(self, points: list[Evaluation]) -> tuple[Evaluation, str]:
        speeds = [self.predicted_speed(e) for e in points]
        words = "predicted within" if any(e.measured for e in points) else "that are within"
        return self.best_score(points, speeds, words)

    def best_score(self, points: list[Evaluation], speeds: list[float], words: str) -> tuple[Evaluation, str]:
        fastest = max(range(len(points)), key=speeds.__getitem__)
        bound = (1 - self.slack_percent / 100) * speeds[fastest]
        near = [i for i, speed in enumerate(speeds) if speed >= bound]
        best = max(near, key=lambda i: (points[i].score or 0.0, speeds[i]))
        fastest_words = f"({points[fastest].label}, {speeds[fastest]:,.0f} tokens/s)"
        return points[best], (
            f"the best score of the {len(near)} of {len(points)} points {words} {self.slack_percent:g} % of the "
            f"fastest {fastest_words}"
        )

    def to_build_whole(self, front: list[Evaluation], most: int, built: list[Evaluation]) -> list[Evaluation]:
        """At most `most` points: the likely choice, those `built` already, both ends, then some spread between."""
        if len(front) <= most:
            return front
        last = len(front) - 1
        spread = [front[round(i * last / max(1, most - 1))] for i in range(most)]
        wanted = [self.choose(front)[0], *built, front[0], front[-1], *spread]
        return list({id(e): e for e in wanted}.values())[:most]
