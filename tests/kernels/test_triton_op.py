"""Ops know their kernels, as torch.library.triton_op has them, and importing them imports no Inductor."""

import json
import subprocess
import sys

from helpers.paths import with_helpers

PROGRAM = """
import json, sys
from jet_export.kernels import attention, gemv, jet_block
from torch._library import triton as library
early = "torch._inductor" in sys.modules or "torch._dynamo" in sys.modules
def names(kernels):
    return [kernel.__name__ for kernel in kernels]
found = {name: names(library.get_triton_kernels_for_op(f"jet::{name}")) for name in ("attention", "gemv", "jet_block")}
ops = {name: getattr(sys.modules[f"jet_export.kernels.{name}"], name) for name in found}
want = {name: names(library.get_inner_triton_kernels(op._abstract_fn)) for name, op in ops.items()}
print(json.dumps([early, found, want]))
"""


def test_kernels_are_found_once_they_are_asked_for() -> None:
    env = with_helpers(TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    early, found, want = json.loads(done.stdout)
    assert not early and found == want and any(found.values())
