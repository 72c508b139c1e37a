"""What came of the points, the Pareto front of throughput against score, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

from jet_export.model.config import JetNemotronConfig
from jet_export.search.compose import Latency
from jet_export.search.points import Point


@dataclass
class Evaluation:
    """A point and what is known of it."""

    point: Point
    label: str
    refused: str | None = None  # before anything was built
    config: JetNemotronConfig | None = None
    parameters: int = 0
    cache_bytes: int = 0  # states and KV caches of a sequence at the target context
    conv_bytes: int = 0
    score: float | None = None
    predicted: Latency | None = None
    measured: Latency | None = None  # built whole
    missed: str | None = None  # a target, or why there is no figure
    front: bool = False
    chosen: bool = False

    def tokens_per_s(self, batch: int, context: int, phase: str = "decode", latency: Latency | None = None) -> float:
        """Of all sequences together. NaN where it is not known."""
        latency = latency if latency is not None else self.predicted
        ms = latency.get((batch, context, phase)) if latency else None
        if not ms or ms <= 0:
            return float("nan")
        return 1e3 * batch * (context if phase == "prefill" else 1) / ms

    def error(self, case: tuple[int, int, str]) -> float | None:
        """Relative error of the prediction, where the point was built whole."""
        if not self.measured or not self.predicted or case not in self.measured or case not in self.predicted:
            return None
        return self.predicted[case] / self.measured[case] - 1


def pareto(evaluations: list[Evaluation], batch: int, context: int) -> list[Evaluation]:
    """Those that no other beats in throughput and score together, fastest first."""
    able = [e for e in evaluations if e.predicted and e.score is not None and not e.missed]
    able.sort(key=lambda e: (-e.tokens_per_s(batch, context), -(e.score or 0.0)))
    front: list[Evaluation] = []
    for e in able:
        assert e.score is not None
        if not front or e.score > max(f.score or 0.0 for f in front):
            front.append(e)
    return front


def choose(candidates: list[Evaluation], batch: int, context: int, slack_percent: float) -> tuple[Evaluation, str]:
    """The best score among those within the slack of the fastest: measured whole where some were, else predicted."""
    whole = [e for e in candidates if e.measured]

    def within(judged: list[Evaluation], measured: bool) -> tuple[Evaluation, str]:
        """The best of them, and what it is the best of."""

        def speed(e: Evaluation) -> float:
            return e.tokens_per_s(batch, context, "decode", e.measured if measured else e.predicted)

        fastest = max(judged, key=speed)
        near = [e for e in judged if speed(e) >= (1 - slack_percent / 100) * speed(fastest)]
        how = f"within {slack_percent:g} % of the fastest ({fastest.label}, {speed(fastest):,.0f} tokens/s)"
        how = f"that are {how}" if measured or not whole else f"predicted {how}"
        best = max(near, key=lambda e: (e.score or 0.0, speed(e)))
        return best, f"the best score of the {len(near)} of {len(judged)} points {how}"

    best, why = within(whole or candidates, bool(whole))
    if not whole:
        return best, f"{why}; predicted from its layers: {best.tokens_per_s(batch, context):,.0f} tokens/s"
    if len(whole) < len(candidates):
        likely, of_all = within(candidates, False)
        of_some = f"{why}, of those measured whole ({len(whole)} of the {len(candidates)} on the front)"
        why = of_all if likely is best else of_some
    return best, f"{why}; measured whole: {best.tokens_per_s(batch, context, latency=best.measured):,.0f} tokens/s"


def to_build_whole(
    front: list[Evaluation], most: int, batch: int, context: int, slack: float, ahead: list[Evaluation]
) -> list[Evaluation]:
    """The likely choice, what is built already, both ends of the front, then points spread between them."""
    if len(front) <= most:
        return front
    n = len(front)
    spread = [front[round(i * (n - 1) / max(1, most - 1))] for i in range(most)]
    wanted = [choose(front, batch, context, slack)[0], *ahead, front[0], front[-1], *spread]
    picked: list[Evaluation] = []
    for e in wanted:
        if not any(e is p for p in picked):
            picked.append(e)
    return picked[:most]
