"""Architectures by name: the published models, and the baseline of comparisons.

Source: the config.json of jet-ai/Jet-Nemotron-2B and -4B (arXiv 2508.15884, table of architectures) and of
Qwen/Qwen3-1.7B-Base. Qwen3.5: the "Model Overview" of the model cards of Qwen/Qwen3.5-0.8B, -2B, -4B and -27B, and for
-9B the defaults of transformers' Qwen3_5TextConfig, which are its sizes; rope_theta, token ids and epsilon: the
text_config in transformers' tests.
"""

from __future__ import annotations

from jet_export.model.config import JetNemotronConfig
from jet_export.model.config_schema import NO_TOKEN
from jet_export.model.qwen3_5 import TEXT


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


def qwen3_5(
    *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, value_heads: int, tied: bool
) -> JetNemotronConfig:
    """The text model of a Qwen3.5: three Gated DeltaNets to one gated attention. What the sizes share is here."""
    return JetNemotronConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        layer_types=("jet", "jet", "jet", "attn") * (layers // 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        rotary_dim=64,
        qk_norm=True,
        qkv_bias=False,
        output_gate=True,
        norm_offset=True,
        jet_conv="static",
        jet_num_heads=value_heads,
        jet_num_key_heads=16,
        head_k_dim=128,
        expand_v=1.0,
        jet_norm_eps=1e-6,
        vocab_size=248320,
        max_position_embeddings=262144,
        rope_theta=1e7,
        tie_word_embeddings=tied,
        bos_token_id=NO_TOKEN,
        eos_token_id=248044,
        model_type=TEXT,
    )


def qwen3_5_0_8b() -> JetNemotronConfig:
    return qwen3_5(hidden=1024, intermediate=3584, layers=24, heads=8, kv_heads=2, value_heads=16, tied=True)


def qwen3_5_2b() -> JetNemotronConfig:
    return qwen3_5(hidden=2048, intermediate=6144, layers=24, heads=8, kv_heads=2, value_heads=16, tied=True)


def qwen3_5_4b() -> JetNemotronConfig:
    return qwen3_5(hidden=2560, intermediate=9216, layers=32, heads=16, kv_heads=4, value_heads=32, tied=True)


def qwen3_5_9b() -> JetNemotronConfig:
    return qwen3_5(hidden=4096, intermediate=12288, layers=32, heads=16, kv_heads=4, value_heads=32, tied=False)


def qwen3_5_27b() -> JetNemotronConfig:
    return qwen3_5(hidden=5120, intermediate=17408, layers=64, heads=24, kv_heads=4, value_heads=48, tied=False)
