"""Random packed inputs of jet::jet_block and its parts, for the kernel tests."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Packed:
    """Ragged sequences over pools with more rows than sequences; every pool row starts random.

    `key_heads`: the inputs of a Gated DeltaNet, whose q and k have so many heads and whose convolution is static and
    over q, k and the values; 0: those of a JetBlock."""

    lens: list[int]
    H: int = 2
    K: int = 32
    V: int = 64
    W: int = 4
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    context: list[int] | None = None
    rows: list[int] | None = None
    extra: int = 0
    key_heads: int = 0
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        r = torch.Generator().manual_seed(self.seed)
        N, T, H, K, V, W = len(self.lens), sum(self.lens), self.H, self.K, self.V, self.W
        HK, D, S = self.key_heads or H, H * V, N + 2
        C = 2 * HK * K + D if self.key_heads else D

        def rand(*shape, dtype=self.dtype):
            return torch.randn(*shape, generator=r).to(dtype).to(self.device)

        def i32(x):
            return torch.tensor(x, dtype=torch.int32, device=self.device)

        self.tensors = {
            "qkuz": rand(T, 2 * HK * K + 2 * D + self.extra),
            "ba": rand(T, 2 * H),
            "kappa": (rand(C * W) if self.key_heads else rand(T, D * W)) * 0.5,
            "A_log": torch.empty(H).uniform_(0.1, 8, generator=r).log().to(self.device),
            "dt_bias": rand(H, dtype=torch.float32) - 3,
            "w_o": rand(V) * 0.1 + 1,
            "conv_state": rand(S, W - 1, C),
            "recurrent_state": rand(S, H, K, V, dtype=self.state_dtype),
            "cu_seqlens": i32([0, *self.lens]).cumsum(0).int(),
            "slots": i32(self.rows if self.rows is not None else [S - 1 - n for n in range(N)]),
            "context_lens": i32(self.context if self.context is not None else [5] * N),
        }

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def block_args(self, form: int, dtype: torch.dtype | None = None, device: str | None = None) -> tuple:
        """Arguments of jet_block, states cloned; `dtype` widens the floating-point ones."""
        t = {n: self.cast(x, dtype, device) for n, x in self.tensors.items()}
        return (*t.values(), self.H, self.K, self.V, 1e-5, form)

    def rule_args(self, form: int, dtype: torch.dtype | None = None, device: str | None = None) -> tuple:
        """Arguments of gated_delta_rule over the same data, state cloned."""
        T, H, K, V = self.qkuz.shape[0], self.H, self.K, self.V
        HK = self.key_heads or H
        q, k, v = self.qkuz[:, : 2 * HK * K + H * V].split([HK * K, HK * K, H * V], -1)
        b, a = self.ba.split(H, -1)
        g = -self.A_log.exp() * torch.nn.functional.softplus(a.float() + self.dt_bias)
        views = (q.unflatten(-1, (HK, K)), k.unflatten(-1, (HK, K)), v.unflatten(-1, (H, V)), b.sigmoid(), g)
        args = (*views, self.recurrent_state, self.cu_seqlens, self.slots, self.context_lens)
        assert views[2].shape == (T, H, V)
        return (*(self.cast(x, dtype, device) for x in args), form)

    def conv_args(self, dtype: torch.dtype | None = None, device: str | None = None) -> tuple:
        """Arguments of dynamic_conv over the same data, state cloned."""
        H, K, V = self.H, self.K, self.V
        u = self.qkuz[:, 2 * H * K : 2 * H * K + H * V]
        if self.key_heads:
            u = self.qkuz[:, : self.conv_state.shape[2]]
        args = (u, self.kappa, self.conv_state, self.cu_seqlens, self.slots, self.context_lens)
        return tuple(self.cast(x, dtype, device) for x in args)

    @staticmethod
    def cast(x: Tensor, dtype: torch.dtype | None, device: str | None) -> Tensor:
        """A copy that keeps row strides where nothing changes."""
        if dtype is not None and x.is_floating_point():
            x = x.to(dtype)
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device)
        return copy.copy_(x)
