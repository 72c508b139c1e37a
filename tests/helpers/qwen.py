"""Small random Qwen2, Qwen3 and Qwen3.5 checkpoints with what transformers made of them, in tests/data/qwen.

Each file: `weight.<name>`, `input_ids` [B, T], `logits` [B, T, vocab], `prompt` [P] and `greedy` [N]; of Qwen3.5 also
`state.{layer}.recurrent` [B, H, K, V] and `.conv` [B, C, 4] after input_ids. Metadata `config` is the config.json that
transformers wrote, `transformers` its version. qwen2 was written by 4.57, the others by 5, whose config.json has
rope_parameters. qwen3_5_mtp has `weight.mtp.*`, a multi-token-prediction layer for the model of qwen3_5, and its
`logits` [B, T - 1, vocab] behind that model's input_ids. To write one again:

    python -m helpers.qwen qwen2
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.golden import DATA, Golden
from jet_export.model.config import JetNemotronConfig

QWEN = DATA / "qwen"
KINDS = ("qwen2", "qwen3")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
}
PER_KIND: dict[str, dict[str, Any]] = {  # Qwen3: head_dim is not hidden_size / heads, lm_head has its own weights
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
    "qwen3_5": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,  # three Gated DeltaNets, one attention
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
TOKENS = {"qwen3_5": 64}  # of input_ids; others 70


def load_qwen(kind: str) -> Golden:
    with safe_open(QWEN / f"{kind}.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    return Golden(config, [], weights, {k: v for k, v in tensors.items() if not k.startswith("weight.")})


def short_qwen() -> JetNemotronConfig:
    """The Qwen3.5 of the goldens, cut to a layer of each kind."""
    config = JetNemotronConfig.from_dict(load_qwen("qwen3_5").config)
    return replace(config, layer_types=("jet", "attn"))


def in_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, the weight that they stand for) of a matrix, a scale for every block."""
    scales = torch.stack(
        [torch.stack([part.abs().max() / 448 for part in rows.split(block[1], 1)]) for rows in weight.split(block[0])]
    )
    N, K = weight.shape
    every = scales.repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
    codes = (weight / every).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * every


def outputs(model: Any, input_ids: Tensor, prompt: Tensor, new: int) -> dict[str, Tensor]:
    """Of a model of transformers: logits, and greedy tokens, each from all tokens before it, without a cache."""
    ids = prompt
    with torch.no_grad():
        logits = model(input_ids).logits
        for _ in range(new):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
    return {"input_ids": input_ids, "logits": logits, "prompt": prompt, "greedy": ids[len(prompt) :]}


def states(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """A Qwen3.5's states after these tokens: recurrent [B, H, K, V], and the last 4 tokens before the convolution."""
    with torch.no_grad():
        cache = model(input_ids, use_cache=True).past_key_values
    out = {}
    for i, kind in enumerate(model.config.layer_types):
        if kind == "linear_attention":
            out[f"state.{i}.recurrent"] = cache.get_recurrent_state(i)
            out[f"state.{i}.conv"] = cache.get_conv_state(i)
    return out


def random_qwen(kind: str, rng: torch.Generator, **sizes: Any) -> Any:
    """A model of transformers, small unless `sizes` say otherwise; every weight of it random."""
    import transformers

    name, hybrid = kind.capitalize(), kind == "qwen3_5"
    config_class = getattr(transformers, f"{name}{'Text' if hybrid else ''}Config")
    config = config_class(rope_theta=1e6, **{**SIZES, **PER_KIND[kind], **sizes})
    if hasattr(config, "rope_parameters"):  # transformers 5
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    if hybrid:
        mrope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        config.rope_parameters |= {"partial_rotary_factor": 0.25, **mrope}
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, p in model.named_parameters():
        if key.endswith(("A_log", "dt_bias")):
            p.data.add_(torch.randn(p.shape, generator=rng) * 0.1)
        else:  # Qwen3.5's norms are 1 + w, that of its Gated DeltaNets excepted
            mean = 1.0 if "norm" in key and (not hybrid or "linear_attn" in key) else 0.0
            p.data.normal_(mean, 0.3 if "norm" in key else 1.2 / config.hidden_size**0.5, generator=rng)
    return model


def write(kind: str) -> None:
    import transformers

    rng, hybrid = torch.Generator().manual_seed(7), kind == "qwen3_5"
    model = random_qwen(kind, rng)
    config = model.config
    ids = torch.randint(config.vocab_size, (2, TOKENS.get(kind, 70)), generator=rng)
    found = outputs(model, ids, torch.randint(config.vocab_size, (9,), generator=rng), 24)
    if hybrid:
        found |= states(model, ids)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        weights = load_file(Path(directory) / "model.safetensors")
        written = (Path(directory) / "config.json").read_text()
    QWEN.mkdir(exist_ok=True)
    tensors = {**{f"weight.{k}": v for k, v in weights.items()}, **found}
    meta = {"config": written, "transformers": transformers.__version__}
    save_file({k: v.contiguous() for k, v in tensors.items()}, QWEN / f"{kind}.safetensors", meta)


def write_mtp() -> None:
    """transformers has no such layer: it is put together of its norm, its layer of attention and a matrix."""
    import transformers
    from transformers.models.qwen3_5 import modeling_qwen3_5 as parts

    golden, rng = load_qwen("qwen3_5"), torch.Generator().manual_seed(8)
    with tempfile.TemporaryDirectory() as directory:
        model = transformers.AutoModelForCausalLM.from_pretrained(golden.save_checkpoint(Path(directory))).eval()
    c = transformers.Qwen3_5TextConfig(
        **{**model.config.to_dict(), "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    )
    c._attn_implementation = "eager"
    norms = [parts.Qwen3_5RMSNorm(c.hidden_size, eps=c.rms_norm_eps) for _ in range(3)]
    names = dict(zip(("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"), norms, strict=True))
    fc = torch.nn.Linear(2 * c.hidden_size, c.hidden_size, bias=False)
    layer = parts.Qwen3_5DecoderLayer(c, 0).eval()
    mtp = torch.nn.ModuleDict({**names, "fc": fc, "layers": torch.nn.ModuleList([layer])})
    for key, p in mtp.named_parameters():
        p.data.normal_(0.0, 0.3 if "norm" in key else 0.15, generator=rng)
    ids = golden.input_ids
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, :-1]
        x = fc(torch.cat([norms[0](model.model.embed_tokens(ids[:, 1:])), norms[1](hidden)], -1))
        T = x.shape[1]
        rope = model.model.rotary_emb(x, torch.arange(T).view(1, 1, -1).expand(3, len(x), -1))
        mask = torch.full((T, T), torch.finfo(x.dtype).min).triu(1)[None, None]
        logits = model.lm_head(norms[2](layer(x, rope, attention_mask=mask)))
    tensors = {f"weight.mtp.{k}": v for k, v in mtp.state_dict().items()} | {"logits": logits}
    meta = {"config": "{}", "transformers": transformers.__version__}
    save_file({k: v.contiguous() for k, v in tensors.items()}, QWEN / "qwen3_5_mtp.safetensors", meta)


if __name__ == "__main__":
    write_mtp() if sys.argv[1] == "qwen3_5_mtp" else write(sys.argv[1])
