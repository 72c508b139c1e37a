"""Compares two engines on the same packed steps, within measured bounds.

Three trials take every step: the engine under test E, the eager model e with the same weights, and the reference f,
which is e without its roundings (`reference_engine`). For logits and for every layer's states, each separately,

    |E - e|  <=  |E - f| + |e - f|  <=  FACTOR |e - f| + u |e|,      FACTOR = 2

since E and e are two roundings of one function f, and E must be no less exact than e. u is the unit roundoff of the
model dtype: values that both compute exactly may still be stored one rounding apart. KL divergence grows with the
square of the logits' distance, hence FACTOR^2.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jet_export.backends.base import Engine
from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.cache import BESIDE_STATE
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.verify.trial import FP8, Layout, Trial, scenarios

FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One quantity of one stage. Errors are norms relative to the eager model's."""

    stage: str
    what: str  # "logits" or a state, e.g. "layers.3.recurrent_state"
    max_abs: float
    relative: float  # |E - e| / |e|
    relative_bound: float
    worst_row: float  # of one row (a token, a head, a tap), relative to its own or a typical row's norm
    worst_row_bound: float
    cosine: float | None = None  # from here on: of logits only
    kl: float | None = None  # mean KL(e || E), nats
    kl_bound: float | None = None
    top1: float | None = None

    def failures(self) -> list[str]:
        pairs = [
            ("relative error", self.relative, self.relative_bound),
            ("error of the worst row", self.worst_row, self.worst_row_bound),
        ]
        if self.kl is not None and self.kl_bound is not None:
            pairs.append(("KL divergence", self.kl, self.kl_bound))
        return [
            f"{self.stage}: {self.what}: {name} {value:.3g}, bound {bound:.3g}"
            for name, value, bound in pairs
            if not value <= bound
        ]

    @property
    def ratio(self) -> float:
        """The largest ratio of a value to its bound; above 1 is a failure."""
        ratios = [self.relative / self.relative_bound, self.worst_row / self.worst_row_bound]
        if self.kl is not None and self.kl_bound is not None:
            ratios.append(self.kl / self.kl_bound)
        return max(ratios) if all(r == r for r in ratios) else float("nan")


def distances(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """(max abs, relative, worst row) of a - b for [rows, features]."""
    norms, errors = b.norm(dim=1), (a - b).norm(dim=1)
    typical = norms.square().mean().sqrt().clamp(min=1e-30)
    worst = (errors / norms.maximum(typical)).max()
    return (a - b).abs().max().item(), (errors.norm() / norms.norm().clamp(min=1e-30)).item(), worst.item()


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each row, nats."""
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def measure(stage: str, what: str, results: list[Tensor], u: float, u_row: float) -> Measure:
    """Compare E with e, bounded by e - f; `results` are E, e, f. u, u_row: unit roundoffs of the model dtype, and of
    the dtype that rows are stored in."""
    E, e, f = results
    max_abs, relative, worst = distances(E, e)
    _, relative_noise, worst_noise = distances(f, e)
    bounds = FACTOR * relative_noise + u, FACTOR * worst_noise + u_row
    errors = Measure(
        stage=stage,
        what=what,
        max_abs=max_abs,
        relative=relative,
        relative_bound=bounds[0],
        worst_row=worst,
        worst_row_bound=bounds[1],
    )
    if what != "logits":
        return errors
    kl_floor = 0.5 * (u * e.square().mean().sqrt().item()) ** 2  # of logits with a relative error of u
    return replace(
        errors,
        cosine=torch.nn.functional.cosine_similarity(E, e).mean().item(),
        kl=kl_divergence(e, E).mean().item(),
        kl_bound=FACTOR**2 * kl_divergence(e, f).mean().item() + kl_floor,
        top1=(E.argmax(-1) == e.argmax(-1)).float().mean().item(),
    )


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@torch.no_grad()
def reference_engine(eager: EagerEngine, seed: int = 0) -> EagerEngine:
    """The eager model in fp32, with the same weights widened; FP8 layers and an FP8 cache keep their codes and scales.

    An fp32 model is compared with itself with every matrix perturbed by u sqrt(n) in random directions, where u = 2^-24
    is the unit roundoff and n the length of its dot products: a dot product summed in any order is the exact one of
    weights perturbed by that much (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1, with his rule
    of thumb sqrt(n) for n).
    """
    widened: dict[int, object] = {}
    rng = torch.Generator(device=eager.device).manual_seed(seed)
    exact = eager.dtype == torch.float32

    def widen(t: Tensor) -> Tensor:
        if t.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return t
        if exact and t.dim() == 2 and t.shape[0] != eager.model.max_positions:
            sign = torch.randint(0, 2, t.shape, generator=rng, device=t.device, dtype=torch.int8)
            u: float = 2.0**-24 * t.shape[1] ** 0.5
            return t + t * (sign.float() * 2 - 1) * u
        return t.float()

    for p in eager.model.parameters():
        widened[id(p)] = nn.Parameter(widen(p), requires_grad=False)
    for b in eager.model.buffers():
        widened[id(b)] = widen(b)
    model: JetNemotronForCausalLM = copy.deepcopy(eager.model, widened)
    kv = next((s.dtype for s in eager.specs if s.dtype == FP8), torch.float32)
    interval, rollback = eager.state_interval, eager.rollback
    return EagerEngine(model, eager.limits, kv_dtype=kv, state_interval=interval, rollback=rollback)


def limited(engine: Engine, sequences: int, tokens: int) -> Engine:
    """The engine with smaller limits, for runners with smaller pools."""
    out = copy.copy(engine)
    chunk = min(engine.limits.prefill_chunk, tokens)
    out.limits = Limits(
        max_batch_size=min(engine.limits.max_batch_size, sequences),
        max_seq_len=min(engine.limits.max_seq_len, tokens),
        prefill_chunk=chunk,
    )
    return out


@dataclass
class StageResult:
    """The results of one stage. A failure names the stage, the quantity, its value and its bound."""

    name: str
    tokens: int
    measures: list[Measure]
    failures: list[str]

    def to_dict(self) -> dict[str, Any]:
        measures = [asdict(m) for m in self.measures]
        return {"stage": self.name, "tokens": self.tokens, "failures": self.failures, "measures": measures}


@torch.no_grad()
def compare(
    engine: Engine, eager: EagerEngine, reference: EagerEngine, prompts: list[list[int]], seed: int = 0
) -> Generator[StageResult, None, Trial]:
    """Run every scenario and yield each stage's result. Returns the eager model's last trial, where probes start."""
    u = unit_roundoff(eager.dtype)
    compared = [s for s in eager.specs if not s.name.endswith(BESIDE_STATE)]
    stored = {s.name.removesuffix("kv_cache"): unit_roundoff(s.dtype) for s in compared}
    for scenario in scenarios(eager.config, eager.limits, eager.rollback):
        layout = Layout(
            eager.config,
            tokens=scenario.tokens,
            longest_call=scenario.longest_call,
            seed=seed,
            device=eager.device,
        )
        trials = [Trial(e, layout, prompts) for e in (engine, eager, reference)]
        for stage in scenario.stages:
            since = list(trials[1].held) if stage.forced else None
            if stage.forced:
                for t in (trials[0], trials[2]):
                    t.load(trials[1].states, trials[1].held)
            logits = [torch.cat([t.step(c) for c in stage.calls]) for t in trials]
            measures = [measure(stage.name, "logits", logits, u, u)]
            states = [t.snapshot(since) for t in trials]
            for name in states[0]:
                u_row = max(u, stored.get(name, stored.get(name[:-1], 0.0)))
                measures.append(measure(stage.name, name, [s[name] for s in states], u, u_row))
            failures = [f for m in measures for f in m.failures()]
            failures += [f"{stage.name}: {n}: a row of no sequence was written" for n in trials[0].overwritten()]
            tokens = sum(n for c in stage.calls for r, n in zip(c.rows, c.lens, strict=True) if r >= 0)
            yield StageResult(stage.name, tokens, measures, failures)
    return trials[1]
