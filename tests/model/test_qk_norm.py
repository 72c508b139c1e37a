"""The baseline of comparisons: full attention with qk-norm and no qkv bias, beside plain torch and Qwen3 itself."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import relative_error

from jet_export.bundle.memory import parameter_count
from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.presets import jet_2b, jet_4b, qwen3_1_7b
from jet_export.model.weights import checkpoint_layout

TOLERANCE = 2e-5  # fp32


@pytest.fixture(scope="module")
def config() -> JetNemotronConfig:
    return dataclasses.replace(
        qwen3_1_7b(),
        layer_types=("attn",) * 3,
        vocab_size=199,
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=512,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )


@pytest.fixture(scope="module")
def model(config) -> JetNemotronForCausalLM:
    model = random_model(config, torch.float32, "cpu", seed=3)
    rng = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        p.data.normal_(1.0, 0.3, generator=rng) if "norm" in name else p.data.normal_(0.0, 0.1, generator=rng)
    return model


@pytest.fixture(scope="module")
def ids(config) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(5))


def published(model: JetNemotronForCausalLM) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    return {n: params[s.param][s.start : s.start + s.shape[0]] for n, s in checkpoint_layout(model.config).items()}


def plain(c: JetNemotronConfig, w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Qwen3 in plain torch, fp64, from published names (Qwen3 technical report, arXiv 2505.09388)."""
    w = {n: t.double() for n, t in w.items()}
    B, T = ids.shape

    def rms(x, weight):
        return weight * x * (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt()

    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    angle = torch.arange(T).double()[:, None] * frequency

    def rope(x):  # [B, T, heads, Dh]
        x1, x2 = x.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)

    h = w["model.embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        x = rms(h, w[at + "input_layernorm.weight"])
        q, k, v = (F.linear(x, w[f"{at}self_attn.{p}_proj.weight"]).view(B, T, -1, c.head_dim) for p in "qkv")
        q, k = (rope(rms(y, w[f"{at}self_attn.{p}_norm.weight"])) for p, y in (("q", q), ("k", k)))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(B, T, -1)
        h = h + F.linear(o, w[at + "self_attn.o_proj.weight"])
        x = rms(h, w[at + "post_attention_layernorm.weight"])
        gate, up = (F.linear(x, w[f"{at}mlp.{p}_proj.weight"]) for p in ("gate", "up"))
        h = h + F.linear(F.silu(gate) * up, w[at + "mlp.down_proj.weight"])
    return F.linear(rms(h, w["model.norm.weight"]), w["model.embed_tokens.weight"])


def test_equals_the_plain_form(model, ids) -> None:
    assert relative_error(model(ids), plain(model.config, published(model), ids)) < TOLERANCE


def test_chunks_and_decode_steps_equal_the_whole(model, ids) -> None:
    cache = model.new_cache(2, 150, 96)
    parts = [model(x, cache) for x in ids.split([96, 50, 1, 1, 1, 1], 1)]
    assert relative_error(torch.cat(parts, 1), model(ids)) < TOLERANCE


def test_equals_qwen3_of_transformers(model, ids) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    c = model.config
    theirs = transformers.Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        rope_theta=c.rope_theta,
    )
    if hasattr(theirs, "rope_parameters"):
        theirs.rope_parameters = {"rope_type": "default", "rope_theta": c.rope_theta}
    qwen = transformers.Qwen3ForCausalLM(theirs).eval()
    missing, unexpected = qwen.load_state_dict(published(model), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    qwen.tie_weights()
    with torch.no_grad():
        assert relative_error(model(ids), qwen(ids).logits) < TOLERANCE


def test_a_checkpoint_survives_a_round_trip(model, ids, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = JetNemotronForCausalLM.from_pretrained(tmp_path, torch.float32)
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))


def test_the_baseline_has_the_sizes_of_qwen3_1_7b() -> None:
    """1,720,574,976 parameters: the sum of Qwen/Qwen3-1.7B-Base's tensors, lm_head tied."""
    c = qwen3_1_7b()
    attention = 2048 * 128 * (16 + 8 + 8 + 16) + 2 * 128
    layer = attention + 3 * 2048 * 6144 + 2 * 2048
    assert parameter_count(c) == 28 * layer + 151936 * 2048 + 2048 == 1_720_574_976
    assert JetNemotronConfig.from_dict(c.to_dict()) == c


def test_published_models_have_neither() -> None:
    for c in (jet_2b(), jet_4b()):
        assert not c.qk_norm and c.qkv_bias
        assert not {"qk_norm", "qkv_bias"} & c.to_dict().keys()
        names = checkpoint_layout(c)
        assert any("q_proj.bias" in n for n in names) and not any("q_norm" in n for n in names)
