"""AOTInductor packages: a graph exported and compiled without weights, and a check that the packages load.

A package is given its weights when it is loaded, one copy for all packages of a bundle.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from jet_export.backends import mtp_graph
from jet_export.backends.graph import EngineGraph, dynamic_shapes, example_inputs, form_of, quiet_torch
from jet_export.backends.inductor.workarounds import lasting_names
from jet_export.backends.modes import FEW_ROWS, MODES, MTP_DECODE, MTP_PREFILL, ONE_ROW, VERIFY
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.kernels.common import dependent_launch
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.model.mode import Linears, graph_mode
from jet_export.utils.compiler import compiler_words, find_compiler
from jet_export.utils.errors import JetExportError


def modes_for(
    device: str, decode_one: bool = True, fused: bool = False, verify: bool = False, mtp: bool = False
) -> tuple[str, ...]:
    """The packages of a bundle. On a GPU also one that decodes a single sequence: reading the weights bounds it;
    `fused`: and one that decodes a few. `verify`: one that verifies drafts; `mtp`: two of the layer that makes them."""
    modes = (*MODES, *((VERIFY,) if verify else ()), *((MTP_PREFILL, MTP_DECODE) if mtp else ()))
    if device != "cuda":
        return modes
    return (*modes, *((ONE_ROW,) if decode_one else ()), *((FEW_ROWS,) if fused else ()))


def export_graph(
    model: JetNemotronForCausalLM, mode: str, dtypes: Dtypes, limits: Limits, fused: bool = False
) -> ExportedProgram:
    """torch.export of one graph; `jet::` ops stay nodes. `fused`: those of decode_one take in what is around them."""
    graph: nn.Module
    if mode in (MTP_PREFILL, MTP_DECODE):
        args, shapes = mtp_graph.example_inputs(model, mode), mtp_graph.dynamic_shapes(limits, mode)
        graph = mtp_graph.MtpGraph(model, mode).eval()
    else:
        args, shapes = example_inputs(model, dtypes, mode), dynamic_shapes(model, dtypes, limits, mode)
        graph = EngineGraph(model, form_of(mode), dtypes.state_interval).eval()
    with torch.no_grad(), quiet_torch(), graph_mode("inductor", linears_of(mode, dtypes, fused)):
        return torch.export.export(graph, args, dynamic_shapes=shapes, strict=False)


def linears_of(mode: str, dtypes: Dtypes, fused: bool) -> Linears:
    """What the linear layers of a graph are. Fast accumulation is for the library's products only."""
    if mode == FEW_ROWS:
        return "skinny"
    if mode == ONE_ROW:
        return "fused" if fused else "gemv"
    return "fast" if dtypes.fast_accumulation else "library"


def compile_package(program: ExportedProgram, path: Path, dependent: bool = False) -> None:
    """AOTInductor: one .pt2 without weights. `dependent`: its kernels may be launched by programmatic edges."""
    configs = {
        "aot_inductor.package_constants_in_so": False,
        "always_keep_tensor_constants": True,
        # Round where the eager model rounds: a fused cast left out flips FP8 codes.
        "emulate_precision_casts": True,
    }
    # Division to within two units in the last place, not exactly rounded: SiLU and quantisation take half the
    # instructions. The option's name differs between versions of torch.
    options = torch._inductor.config._config  # type: ignore[attr-defined]
    configs |= {k: False for k in options if "divi" in k and k.endswith("rounding")}
    with (
        find_compiler("an Inductor package").executable() as cxx,
        torch._inductor.config.patch({"cpp.cxx": (None, cxx)}),  # torch takes $CXX for the name of one file
        quiet_torch(),
        lasting_names(),
        dependent_launch(dependent),
    ):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


LOAD_PROBE = """
import sys
from pathlib import Path
import torch
from jet_export.backends.inductor.engine import Package
for path in sys.argv[2:]:
    Package(Path(path), torch.device(sys.argv[1]))
"""


def check_loads(directory: Path, device: str = "cpu") -> None:
    """Load the packages in another process: code from an incompatible compiler can kill the one that loads it."""
    packages = sorted(str(p) for p in directory.glob("*.pt2"))
    probe = [sys.executable, "-c", LOAD_PROBE, device, *packages]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=600)
    if done.returncode == 0:
        return
    if done.returncode < 0:
        how = f"the process that loads them dies of {signal.Signals(-done.returncode).name}"
    else:
        how = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    raise JetExportError(
        f"the compiled packages do not load: {how}.",
        f"The C++ compiler ({shlex.join(compiler_words())}) does not fit this Python's libstdc++. Name the system's: "
        "export CC=/usr/bin/gcc CXX=/usr/bin/g++, and build again.",
    )
