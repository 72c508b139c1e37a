"""SGLang's JetBlock between its projections, by SGLang's own code, to stand beside jet::jet_block.

SGLang's package imports its whole server. Wanted of it are the class JetBlock and the Triton kernels that it calls
(`sglang.srt.models.jet_nemotron`, `sglang.kernels.ops.attention.fla`); these files are imported as they are, and what
else they import of SGLang - linear layers, its attention backend, its platform checks - is stood in for here. So it is
enough that those files lie on sys.path, without SGLang's requirements (einops and packaging apart).

Projections are taken out on both sides: the stand-in of a linear layer hands out a tensor made before. What is left is
SiLU of q and k, the dynamic convolution (a Python loop over sequences), the gates, the recurrent delta rule, in prefill
too, and the gated norm.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

REAL = ("sglang.srt.models.jet_nemotron", "sglang.kernels.ops.attention.fla")


class HybridBackend:
    """Stands in for the backend that SGLang's layer asks for its caches."""

    linear_attn_backend: Any = None


class LinearBackend:
    """The same for linear attention."""


CURRENT = HybridBackend()


def known() -> dict[str, Any]:
    """What the files use of the rest of SGLang when they run; all else is never called."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return {
        "HybridLinearAttnBackend": HybridBackend,
        "MambaAttnBackendBase": LinearBackend,
        "get_attn_backend": lambda: CURRENT,
        "torch_release": tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:3]),
        "is_arch_support_pdl": lambda: hopper,
        "is_batch_invariant_mode_enabled": lambda: False,
        "check_cuda_graph_backend": lambda *a: False,
        "cdiv": lambda a, b: -(-a // b),
        "next_power_of_2": lambda n: 1 << max(0, n - 1).bit_length(),
        "device_context": lambda device: torch.cuda.device(device) if device.type == "cuda" else torch.device(device),
        "is_cpu": lambda: False,
        "is_npu": lambda: False,
        "cpu_has_amx_support": lambda: False,
    }


class Named(type):
    """A class of SGLang that nothing is made of here; what is asked of it is None."""

    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class StandIn(ModuleType):
    """A module of SGLang that is not imported: its names are the `known` ones, or classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = known()
        return found[name] if name in found else Named(name, (nn.Module,), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of SGLang but the REAL ones, before Python's own finders do."""

    def __init__(self, roots: list[str]) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "sglang" or any(name == real or name.startswith(real + ".") for real in REAL):
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(Path(root, *name.split(".")[1:])) for root in self.roots]
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stood_in(roots: list[str]) -> Iterator[None]:
    """SGLang's other modules stood in for; all are forgotten afterwards."""
    finder = StandIns(roots)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "sglang"]:
            del sys.modules[name]


def import_sglang() -> SimpleNamespace | None:
    """Its `module` jet_nemotron and its `version`, or None, with a line that says why."""
    spec = importlib.util.find_spec("sglang") if "sglang" not in sys.modules else None
    if spec is None or not spec.submodule_search_locations:
        print("SGLang is not compared with: it is not installed")
        return None
    try:
        with stood_in(list(spec.submodule_search_locations)):
            module = importlib.import_module("sglang.srt.models.jet_nemotron")
            return SimpleNamespace(module=module, version=version())
    except (ImportError, AttributeError) as error:
        print(f"SGLang is not compared with: {type(error).__name__}: {error}")
        return None


def version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "(version not known)"


def jet_block_path(sglang: Any, args: tuple, decode: bool) -> tuple[Callable[[], Tensor], SimpleNamespace]:
    """JetBlock.forward over jet_block's arguments: what runs it and returns [T, D], and its caches, which it updates.

    The caches are SGLang's: temporal [slots, H, V, K], conv[0] [slots, D, W - 1]; a new sequence finds zeros there.
    """
    qkuz, ba, kappa, A_log, dt_bias, w_o, conv_state, state, cu_seqlens, slots, context_lens, H, K, V, eps = args
    D, Q = H * V, H * K
    q, k, u, gate = qkuz[:, : 2 * Q + 2 * D].split([Q, Q, D, D], -1)
    b, a = ba.split(H, -1)
    old = torch.zeros(len(state), dtype=torch.long, device=state.device)
    old[slots.long()] = (context_lens > 0).long()  # a slot that no sequence has yet is zeros too
    temporal = (state.transpose(-1, -2) * old.view(-1, 1, 1, 1).to(state.dtype)).contiguous()
    taps = (conv_state.transpose(-1, -2) * old.view(-1, 1, 1).to(conv_state.dtype)).contiguous()
    cache = SimpleNamespace(temporal=temporal, conv=[taps])
    lens = cu_seqlens.diff()

    conv = made(
        sglang.module.DynamicShortConvolution,
        kernel_generator=lambda x: kappa,
        hidden_size=D,
        kernel_size=taps.shape[-1] + 1,
    )
    with torch.device(qkuz.device):
        norm = sglang.module.RMSNormGated(V, eps=eps)
    norm.weight = nn.Parameter(w_o.detach().clone(), requires_grad=False)
    qkvabz = torch.cat([q, k, u, a, b, gate], -1).contiguous()
    block = made(
        sglang.module.JetBlock, qkvabz_proj=lambda x: (qkvabz, None), o_proj=lambda o: (o, None), dynamic_conv1d=conv,
        o_norm=norm, A_log=A_log, dt_bias=dt_bias, conv_size=conv.kernel_size, head_k_dim=K, head_v_dim=V, num_heads=H,
        total_k_dim=Q, total_v_dim=D, layer_id=0,
    )  # fmt: skip
    linear: Any = LinearBackend()
    linear.forward_metadata = SimpleNamespace(mamba_cache_indices=slots, query_start_loc=cu_seqlens)
    linear.req_to_token_pool = SimpleNamespace(mamba2_layer_cache=lambda layer: cache)
    batch = SimpleNamespace(extend_seq_lens=None if decode else lens, batch_size=len(lens))

    @torch.inference_mode()
    def run() -> Tensor:
        CURRENT.linear_attn_backend = linear
        return block.forward(None, qkvabz, batch)

    return run, cache


def made(cls: Any, **attributes: Any) -> Any:
    """An instance of a torch module without its own __init__, which would build linear layers."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module
