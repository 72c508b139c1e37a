"""Architectures by name: the published models, and the baseline of comparisons.

Source: the config.json of jet-ai/Jet-Nemotron-2B and -4B (arXiv 2508.15884, table of architectures) and of
Qwen/Qwen3-1.7B-Base.
"""

from __future__ import annotations

from jet_export.model.config import JetNemotronConfig


def _layout(layers: int, attn: tuple[int, ...], swa: tuple[int, ...]) -> tuple[str, ...]:
    return tuple("attn" if i in attn else "swa" if i in swa else "jet" for i in range(layers))


def jet_2b() -> JetNemotronConfig:
    """jet-ai/Jet-Nemotron-2B; vocabulary, RoPE and tokens are the class's defaults."""
    return JetNemotronConfig(
        hidden_size=1536,
        intermediate_size=8960,
        layer_types=_layout(28, (14, 19), (20, 21)),
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        jet_num_heads=12,
        head_k_dim=96,
        expand_v=2.6666666667,
        window_size=1152,
        max_position_embeddings=131072,
    )


def jet_4b() -> JetNemotronConfig:
    """jet-ai/Jet-Nemotron-4B; vocabulary, RoPE and tokens are the class's defaults."""
    return JetNemotronConfig(
        hidden_size=2048,
        intermediate_size=11008,
        layer_types=_layout(36, (17, 20, 32), (5, 16, 19, 21, 22, 25, 27)),
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        jet_num_heads=16,
        head_k_dim=128,
        expand_v=2.0,
        window_size=2048,
        max_position_embeddings=32768,
    )


def qwen3_1_7b() -> JetNemotronConfig:
    """Qwen/Qwen3-1.7B-Base, the paper's baseline: full attention alone. The jet sizes are not used."""
    return JetNemotronConfig(
        hidden_size=2048,
        intermediate_size=6144,
        layer_types=("attn",) * 28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        qk_norm=True,
        qkv_bias=False,
        model_type="qwen3",
        jet_num_heads=1,
        head_k_dim=32,
        expand_v=2.0,
        max_position_embeddings=32768,
    )
