"""The calls that rungs make: cases, the sequences of a call, and its form."""

from __future__ import annotations

from dataclasses import replace

from jet_export.kernels.form import Form
from jet_export.ladder.inputs import verify_run
from jet_export.ladder.site import Site
from jet_export.plugins.cases import AttentionCase, Case, JetBlockCase


def node_forms(case: Case) -> list[Form]:
    """Those that graphs have."""
    return [Form.MIXED, Form.VERIFY] if case.rollback else [Form.MIXED]


SMALL: list[Case] = [  # seconds in Triton's interpreter, which computes correctly in fp32
    JetBlockCase(2, 32, 32, 4, "float32", "float32"),
    AttentionCase(4, 2, 32, 16, 0, "float32", "float32"),
    AttentionCase(4, 2, 32, 16, 12, "float32", "float32"),
]
SMALL_RUNS = {"ragged prefill": ([1, 17, 20], [0, 9, 5]), "decode": ([1, 1, 1], [9, 30, 0])}


Run = tuple[list[int], list[int], Form]  # new tokens of each sequence, tokens held, form of the call


def runs_of(case: Case, mixed: dict[str, tuple[list[int], list[int]]]) -> dict[str, Run]:
    """`mixed` in that form, and a call that verifies drafts where the case has any."""
    runs = {name: (lens, context, Form.MIXED) for name, (lens, context) in mixed.items()}
    return runs | ({"drafts": (*verify_run(case), Form.VERIFY)} if case.rollback else {})


def small_cases(site: Site) -> list[Case]:
    """SMALL, with the step buffers and drafts of the bundle."""
    interval, rollback = site.manifest.state_interval, site.manifest.rollback

    def as_built(case: Case) -> Case:
        if isinstance(case, JetBlockCase):
            return replace(case, interval=interval, rollback=rollback)
        return replace(case, rollback=rollback)

    return [as_built(case) for case in SMALL]
