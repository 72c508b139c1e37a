"""The form VERIFY: its widths, its programs, the tensors it writes. Its laws over many calls: test_step_buffer.py."""

import ast
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.checked_memory import checked_memory
from helpers.compare import relative_error
from helpers.packed import Packed
from helpers.paths import with_helpers
from helpers.poison import poisoned

from jet_export.kernels import configs, gated_delta_rule_deferred, gated_delta_rule_verify
from jet_export.kernels.common import INTERPRET
from jet_export.kernels.form import Form
from jet_export.kernels.jet_block import jet_block_ref, jet_block_triton
from jet_export.kernels.state_layout import EXTRA, buffer_rows

H, K, V, INTERVAL = 1, 16, 40, 3


def arguments(lens: list[int], rollback: int, device: str = "cpu") -> list[Any]:
    """A JetBlock's; the first sequence's buffer is full, the second's is not, the third is padding."""
    p = Packed(lens, H=H, K=K, V=V, context=[9, 8, 3], rows=[3, 0, -1], device=device)
    S = len(p.recurrent_state)
    r = torch.Generator().manual_seed(1)
    p.tensors["conv_state"] = torch.randn(S, p.W - 1 + rollback, H * V, generator=r).to(device)
    buffer = 0.1 * torch.randn(S, H, buffer_rows(INTERVAL, rollback), K + V + EXTRA, generator=r)
    position = torch.full((S, H), 6, dtype=torch.int32)
    return [*p.block_args(Form.VERIFY), buffer.to(device), position.to(device), INTERVAL]


def states(args: list[Any]) -> list[torch.Tensor]:
    return [args[i] for i in (6, 7, 16, 17)]  # conv_state, recurrent_state, step_buffer, state_position


@pytest.mark.parametrize("lens, rollback", [([5, 1, 9], 5), ([12, 9, 2], 12)], ids=["8 tokens", "16 tokens"])
def test_either_width_is_the_reference(device, lens, rollback):
    args, ref = arguments(lens, rollback, device), arguments(lens, rollback)
    exact: list[Any] = [
        x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments(lens, rollback)
    ]
    with poisoned():
        got = jet_block_triton(*args)
    fp32, want = jet_block_ref(*ref), jet_block_ref(*exact)
    for a, b, c in zip([got, *states(args)], [fp32, *states(ref)], [want, *states(exact)], strict=True):
        a, b, c = a.cpu().double(), b.double(), c.double()
        if a.shape == c.shape and a.dim() == 4 and a.shape[-1] == K + V + EXTRA:
            a, b, c = (x[..., : K + V + 1] for x in (a, b, c))
        assert relative_error(a, c) <= relative_error(b, c) + 1e-5
    assert not got[sum(lens[:2]) :].any()


@pytest.mark.blas
@pytest.mark.parametrize("sms", [1, 4])
def test_the_programs_of_a_head_do_not_change_a_bit(device, monkeypatch, sms):
    """One, two or more programs for three tiles, the last one of them narrower, and for four groups of rows."""
    many, few = arguments([5, 1, 2], 5, device), arguments([5, 1, 2], 5, device)
    with configs.override("delta_rule_verify", {"BV": 16, "num_warps": 4}):
        want = jet_block_triton(*many)
        for module in (gated_delta_rule_verify, gated_delta_rule_deferred):
            monkeypatch.setattr(module, "num_sms", lambda device: sms)
        got = jet_block_triton(*few)
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(states(few), states(many), strict=True))


def test_programs_fill_the_gpu_once():
    count = gated_delta_rule_verify.programs_of_a_head
    assert [count(n, 12, 8, 132) for n in (1, 2, 4, 8, 16, 64)] == [8, 8, 5, 2, 1, 1]


@pytest.mark.skipif(not INTERPRET, reason="checks memory in Triton's interpreter, which is off on a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [-(2**31), -3, 7, 2**31 - 1])
def test_hostile_integers_stay_inside(value):
    """The same extreme in all integers but the slots, or in those too."""
    for names in ((8, 10, 17), (8, 9, 10, 17)):  # cu_seqlens, slots, context_lens, state_position
        args = arguments([5, 1, 2], 5)
        for i in names:
            args[i] = torch.full_like(args[i], value)
        with checked_memory(args, limit=4000):
            jet_block_triton(*args)


WRITTEN = """
import torch
from helpers.written_tensors import written_tensors
from jet_export.kernels.gated_delta_rule_decode import decode_inputs_kernel
from jet_export.kernels.gated_delta_rule_deferred import deferred_step_kernel
from jet_export.kernels.gated_delta_rule_verify import verify_inputs_kernel
sizes = dict(OFF_Q=0, OFF_K=0, OFF_V=0, OFF_G=0, OFF_Z=0, H=2, HK=1, RAW=True, K=32, V=64, W=4, CONV_ROWS=8, ROWS=8,
             WIDTH=100, INTERVAL=4, PRECISION="tf32x3", BT=8, NK=1, BK=32, BC=16, BR=8, R=5, WORK=1200, GDC=True,
             MIXED=False, STEP=False, NORM=True, ASK=8192, GROUPS=4, FEW=2**20, T=4, S=4, eps=1e-6, CODES=True)
for kernel, tile in ((decode_inputs_kernel, 64), (verify_inputs_kernel, 32), (deferred_step_kernel, 64)):
    sizes["BV"] = tile
    names = kernel.arg_names
    integers = {n: torch.zeros(4, dtype=torch.int32) for n in ("cu_seqlens", "slots", "context_lens", "state_position")}
    values = {n: sizes.get(n, 64 if "stride" in n else integers.get(n, torch.zeros(64, 64))) for n in names}
    print(written_tensors(kernel, values))
"""


@pytest.mark.slow
def test_torch_sees_that_no_input_is_written():
    """But for the integers that addresses of stores come from. For a kernel that it cannot read it takes every argument
    to be written."""
    done = subprocess.run(
        [sys.executable, "-c", WRITTEN], env=with_helpers(TRITON_INTERPRET="0"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, several, step = (set(ast.literal_eval(line)) for line in done.stdout.splitlines())
    integers = {"cu_seqlens", "slots", "context_lens", "state_position"}
    assert one - integers == several - integers == {"conv_state", "work"}
    written = {"out", "recurrent_state", "step_buffer", "work", "parts"}
    assert step - integers == written and "state_position" in step
