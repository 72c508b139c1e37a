"""Laws of every kernel: all outputs are written, bits repeat, and sequences are independent. Interpreted without a GPU.

The problems are those that benchmarks/kernels/sanitize.py runs under compute-sanitizer."""

import functools
import importlib
import pkgutil

import pytest
import torch
from helpers import kernel_problems as kp
from helpers.compare import same_bits
from helpers.poison import poisoned

from jet_export import kernels

pytestmark = pytest.mark.blas
HAS_CUDA = torch.cuda.is_available()


SMALL = kp.problems("cuda" if HAS_CUDA else "cpu")
LIVE, KEPT = (0, 2, 3), 3  # the sequences that are not padding; one of them, of several chunks


@pytest.mark.parametrize("name", SMALL)
def test_every_element_is_written_and_right(name: str) -> None:
    p = SMALL[name]
    assert kp.error_of(p) < 1e-5
    with poisoned(7.0):
        a, after_a = p.run()
    b, after_b = once(name)
    live = kp.live_tokens(p.inputs)
    assert same_bits(a[live], b[live])
    assert all(same_bits(after_a[n], after_b[n]) for n in p.states)


def of_no_sequence(device: str) -> dict[str, kp.Problem]:
    return kp.one_token_problems(device) | kp.few_token_problems(device)


@pytest.mark.parametrize("name", of_no_sequence("cpu"))
def test_of_tokens_of_no_sequence_every_element_is_written_and_right(name: str) -> None:
    p = of_no_sequence("cuda" if HAS_CUDA else "cpu")[name]
    assert kp.error_of(p) < 1e-5
    assert same_bits(p.run()[0], p.run()[0])


@functools.cache
def once(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return SMALL[name].run()


@pytest.mark.parametrize("name", SMALL)
def test_results_repeat_bit_for_bit_and_unused_rows_are_unchanged(name: str) -> None:
    p = SMALL[name]
    (a, after_a), (b, after_b) = once(name), p.run()
    live = kp.live_tokens(p.inputs)
    assert same_bits(a[live], b[live])
    for n in p.states:
        assert same_bits(after_a[n], after_b[n])
        mine = torch.cat([p.rows(s)[n] for s in LIVE])
        unowned = [i for i in range(len(after_a[n])) if i not in mine]
        assert unowned and same_bits(kp.raw(after_a[n])[unowned], kp.raw(p.inputs[n])[unowned])


@pytest.mark.parametrize("name", SMALL)
def test_a_sequence_does_not_depend_on_the_others(name: str) -> None:
    p = SMALL[name]
    out, after = once(name)
    other_out, other_after = p.disturbed(KEPT).run()
    rows = p.rows(KEPT)
    assert same_bits(out[rows[p.tokens[0]]], other_out[rows[p.tokens[0]]])
    for n in p.states:
        assert same_bits(kp.raw(after[n])[rows[n]], kp.raw(other_after[n])[rows[n]])
    assert not same_bits(out, other_out)  # the others did change


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no GPU")
@pytest.mark.parametrize("name", kp.problems("cpu", large=True) if HAS_CUDA else ["models' sizes"])
def test_models_sizes_on_a_gpu(name: str) -> None:
    p = kp.problems("cuda", large=True)[name]
    assert kp.error_of(p) < 2e-2
    (a, after_a), (b, after_b) = p.run(), p.run()
    live = kp.live_tokens(p.inputs)
    assert same_bits(a[live], b[live]) and all(same_bits(after_a[n], after_b[n]) for n in p.states)
    out, _ = p.disturbed(3).run()
    rows = p.rows(3)[p.tokens[0]]
    assert same_bits(a[rows], out[rows])


def test_ops_take_no_defaults() -> None:
    """torch 2.11 drops trailing arguments that equal their defaults, then looks for a mutated one among them."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    ours = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("jet::")]
    assert {"jet::jet_block", "jet::attention", "jet::gated_delta_rule"} <= {s.name for s in ours}
    defaults = {s.name: [a.name for a in s.arguments if a.has_default_value()] for s in ours}
    assert {name: args for name, args in defaults.items() if args} == {}
