"""SGLang's files are imported without the rest of SGLang, and called with its layouts."""

import importlib.util
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.paths import BENCHMARKS

from jet_export.kernels.jet_block import jet_block_ref

# A package laid out as SGLang's: a JetBlock of ours, in SGLang's layouts, and imports of what is not there.
FILES = {
    "__init__.py": "raise RuntimeError('the whole of SGLang was imported')",
    "kernels/ops/attention/fla/utils.py": """
        from sglang.srt.utils.common import torch_release
        assert torch_release >= (2, 11)
    """,
    "kernels/ops/attention/fla/layernorm_gated.py": """
        import torch
        from sglang.kernels.ops.attention.fla import utils
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend

        class RMSNorm(torch.nn.Module):
            def __init__(self, size, eps):
                super().__init__()
                self.eps, self.weight = eps, torch.nn.Parameter(torch.ones(size))

            def forward(self, x, z):
                assert not check_cuda_graph_backend(Phase.PREFILL, Backend.ANY)
                x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
                return x * self.weight * z * torch.sigmoid(z)
    """,
    "srt/models/jet_nemotron.py": """
        import torch
        from torch import nn
        from torch.nn.functional import normalize, pad, silu, softplus
        from sglang.kernels.ops.attention.fla.layernorm_gated import RMSNorm as RMSNormGated
        from sglang.srt.layers.attention.backend import HybridLinearAttnBackend, MambaAttnBackendBase
        from sglang.srt.layers.linear import RowParallelLinear
        from sglang.srt.model_executor.forward_context import get_attn_backend
        from sglang.srt.models.qwen2 import Qwen2Model

        class JetNemotronModel(Qwen2Model):
            pass

        class DynamicShortConvolution(nn.Module):
            def __init__(self):
                self.w = RowParallelLinear()  # would fail: there is no such layer

            def forward(self, u, taps, kappa):  # [T, D], [D, W-1], [T, D, W]
                u = torch.cat([taps.T, u])
                windows = u.unfold(0, self.kernel_size, 1)
                return silu((windows * kappa).sum(-1)), u[-(self.kernel_size - 1):].T

        class JetBlock(nn.Module):
            def forward(self, positions, hidden, batch):
                assert isinstance(get_attn_backend(), HybridLinearAttnBackend)
                backend = get_attn_backend().linear_attn_backend
                assert isinstance(backend, MambaAttnBackendBase)
                meta, cache = backend.forward_metadata, backend.req_to_token_pool.mamba2_layer_cache(self.layer_id)
                H, K, V, Q, D = self.num_heads, self.head_k_dim, self.head_v_dim, self.total_k_dim, self.total_v_dim
                q, k, u, a, b, z = self.qkvabz_proj(hidden)[0].split([Q, Q, D, H, H, D], -1)
                kappa = self.dynamic_conv1d.kernel_generator(hidden).view(-1, D, self.conv_size)
                q, k = (normalize(silu(x).view(-1, H, K), dim=-1, eps=1e-6) for x in (q, k))
                g, beta = -self.A_log.exp() * softplus(a + self.dt_bias), b.sigmoid()
                lens = batch.extend_seq_lens if batch.extend_seq_lens is not None else [1] * batch.batch_size
                start, out = 0, []
                for slot, n in zip(meta.mamba_cache_indices.tolist(), map(int, lens)):
                    taps, S = cache.conv[0][slot], cache.temporal[slot]  # [D, W-1], [H, V, K]
                    v, taps[:] = self.dynamic_conv1d(u[start:start + n], taps, kappa[start:start + n])
                    for t in range(start, start + n):
                        S *= g[t].exp()[:, None, None]
                        change = (v[t - start].view(H, V) - (S @ k[t][:, :, None])[..., 0]) * beta[t][:, None]
                        S += change[:, :, None] * k[t][:, None, :]
                        out.append((S @ q[t][:, :, None])[..., 0] * K**-0.5)
                    start += n
                return self.o_proj(self.o_norm(torch.stack(out), z.view(-1, H, V)).reshape(-1, D))[0]
    """,
}


def arguments(lens: list[int], context: list[int]) -> tuple:
    """Of jet_block, small, fp32."""
    torch.manual_seed(0)
    N, T, H, K, V = len(lens), sum(lens), 2, 16, 32
    D = H * V
    return (
        torch.randn(T, 2 * H * K + 2 * D + 4), torch.randn(T, 2 * H), torch.randn(T, 4 * D) / 2,
        torch.rand(H), torch.randn(H) - 4, 1 + 0.1 * torch.randn(V), torch.randn(N, 3, D), torch.randn(N, H, K, V),
        torch.tensor([0, *lens]).cumsum(0).int(), torch.arange(N - 1, -1, -1).int(), torch.tensor(context).int(),
        H, K, V, 1e-5,
    )  # fmt: skip


def compare(path, sglang, lens: list[int], decode: bool, context: list[int]) -> None:
    """Its output and both its caches with the reference's."""
    args = arguments(lens, context)
    run, cache = path.jet_block_path(sglang, args, decode)
    reference: Callable[..., torch.Tensor] = jet_block_ref
    want = reference(*args, decode)
    torch.testing.assert_close(run(), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache.temporal.transpose(-1, -2), args[7], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache.conv[0].transpose(-1, -2), args[6])


CASES = pytest.mark.parametrize(
    ("lens", "decode", "context"),
    [([5, 1, 9], False, [0, 0, 0]), ([5, 1, 9], False, [0, 4, 7]), ([1] * 4, True, [4] * 4)],
)


@pytest.fixture
def path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS / "kernels")
    import sglang_path

    for name, text in FILES.items():
        file = tmp_path / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield sglang_path
    sys.modules.pop("sglang_path")


def test_only_its_layer_and_kernels_are_imported(path) -> None:
    before = list(sys.meta_path)
    sglang = path.import_sglang()
    assert sglang.module.JetBlock.__module__ == "sglang.srt.models.jet_nemotron"
    assert sglang.module.RMSNormGated.__module__ == "sglang.kernels.ops.attention.fla.layernorm_gated"
    assert sys.meta_path == before and not [name for name in sys.modules if name.split(".")[0] == "sglang"]


def test_without_it_there_is_a_line(path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "sglang").is_dir()])
    assert path.import_sglang() is None and "not installed" in capsys.readouterr().out


def test_another_sglang_is_told(path, tmp_path, capsys) -> None:
    (tmp_path / "sglang" / "srt" / "models" / "jet_nemotron.py").write_text("import no_such_package\n")
    assert path.import_sglang() is None
    assert (
        "SGLang is not compared with: ModuleNotFoundError: No module named 'no_such_package'" in capsys.readouterr().out
    )


@CASES
def test_its_layouts(path, lens, decode, context) -> None:
    compare(path, path.import_sglang(), lens, decode, context)


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter; kernels.py checks it on a GPU")
@CASES
def test_sglang_itself(monkeypatch, lens, decode, context) -> None:
    """Its files as published, in Triton's interpreter, which they do not know of."""
    import triton.language as tl

    monkeypatch.syspath_prepend(BENCHMARKS / "kernels")
    import sglang_path

    monkeypatch.setattr(torch.cpu, "device", lambda index: nullcontext(), raising=False)
    sglang = sglang_path.import_sglang()
    assert sglang is not None
    sys.modules.pop("sglang_path")
    kernels = sglang.module.fused_recurrent_gated_delta_rule_update.__globals__
    monkeypatch.setitem(kernels, "exp", lambda x: tl.exp(x))  # bound before the interpreter replaces tl's functions
    norm = sglang.module.RMSNormGated.forward.__globals__["_layer_norm_fwd"].__globals__
    monkeypatch.setitem(norm, "_get_sm_count", lambda device: 132)
    compare(sglang_path, sglang, lens, decode, context)
