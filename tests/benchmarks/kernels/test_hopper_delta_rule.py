"""The Hopper form's benchmark: what hangs, dies or is wrong is said and shows no speed."""

import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers.scripts import load_script

from jet_export.kernels import hopper_gated_delta_rule
from jet_export.kernels.gated_delta_rule_chunk import chunk_delta_rule_triton

GOOD, BAD = (1e-3, 1e-4), (2e-3, 1e-4)


@pytest.fixture
def script():
    return load_script("kernels/hopper_delta_rule.py")


def errors(**forms: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {"portable": GOOD, "wide": GOOD, "narrow": GOOD, **forms}


def test_a_larger_error_is_red_and_so_is_none(script):
    assert script.red(errors()) == []
    assert script.red(errors(wide=BAD)) == ["wide"]
    assert script.red(errors(narrow=(1e-3, math.nan))) == ["narrow"]


def test_what_hangs_and_what_dies_is_said(script, monkeypatch, capsys):
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(script.subprocess, "run", hangs)
    assert not script.said(script.TINY[0], script.apart(script.TINY[0], timed=False, limit=7))
    dead = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: CUDA error: launch failure\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: dead)
    assert not script.said(script.CASES[0], script.apart(script.CASES[0], timed=True))
    hung, died = capsys.readouterr().out.splitlines()
    assert hung == "qwen3.5-4b [64]: hung: ended after 7 s"
    assert died == "qwen3.5-4b B1 T2048: RuntimeError: CUDA error: launch failure"


def test_the_forms_are_measured_against_fp64(script, monkeypatch):
    """On the CPU and in fp32, the portable form in the place of the others, which need SM 9.0."""
    import block_cases

    def inputs(lens: list[int], model: str, context: int) -> list:
        args = block_inputs(lens, model, context=context, device="cpu")
        return [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]

    block_inputs = block_cases.block_inputs
    sizes = type(block_cases.MODELS["4b"])(2, 16, 16, 1, True)
    monkeypatch.setitem(block_cases.MODELS, "small", sizes)
    monkeypatch.setattr(block_cases, "block_inputs", inputs)
    portable = lambda *args, form, **options: chunk_delta_rule_triton(*args, **options)  # noqa: E731
    monkeypatch.setattr(hopper_gated_delta_rule, "hopper_delta_rule", portable)
    measured = script.measure("small", [3, 5], timed=False)
    assert measured["ms"] == {} and not script.red(measured["errors"])
    assert all(0 < e < 1e-5 for pair in measured["errors"].values() for e in pair)
