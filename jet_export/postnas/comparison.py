"""Steps 2 and 3: blocks, and the JetBlock's choices one by one, at one budget of tokens and equal states.

They report. Later steps keep the JetBlock, which is what engines are built of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jet_export.postnas.blocks import FORMS, MIXERS, TORCH
from jet_export.postnas.candidate import Candidate, run_candidates, slug
from jet_export.postnas.design import DESIGNS, DesignedBlock
from jet_export.postnas.mixer import Mixer, Sizes
from jet_export.postnas.recipe import BudgetRecipe
from jet_export.postnas.session import Session

Make = Callable[[Sizes], Mixer] | None


def run_block(session: Session) -> dict[str, Any]:
    budget = session.recipe.block
    makes: dict[str, Make] = {name: MIXERS.get(name) for name in budget.blocks}
    rows = _compare(session, budget, makes)
    return {"rows": [{**row, "form": FORMS.get(row["name"], TORCH)} for row in rows]}


def run_design(session: Session) -> dict[str, Any]:
    budget = session.recipe.design
    makes: dict[str, Make] = {
        name: partial(DesignedBlock, design=DESIGNS[name]) if name != "jet" else None for name in budget.variants
    }
    return {"rows": _compare(session, budget, makes)}


def _compare(session: Session, budget: BudgetRecipe, makes: Mapping[str, Make]) -> list[dict[str, Any]]:
    layers = session.result("placement")["student_layers"]
    candidates = [
        Candidate(name=name, directory=f"{slug(name)}-{seed}", layers=layers, seed=seed, make=make)
        for seed in range(budget.seeds)
        for name, make in makes.items()
    ]
    return run_candidates(session, candidates, budget)
