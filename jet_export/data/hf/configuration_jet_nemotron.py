"""Jet-Nemotron's config.json for transformers' AutoConfig, 4.57 and 5. A copy lies beside every config.json that
jet-export writes, which names it in `auto_map`:

    AutoConfig.from_pretrained(directory, trust_remote_code=True)

The weights' model is not here: the published repository has its own, and jet-export builds engines of it.
"""

from transformers import PretrainedConfig


class JetNemotronConfig(PretrainedConfig):
    """The fields of config.json as attributes; `layer_types` has `jet`, `attn` or `swa` for each layer."""

    model_type = "jet_nemotron"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, layer_types=None, efficient_attention_config=None, tie_word_embeddings=False, **fields):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **fields)
        # After transformers 5 has checked the fields: it knows other layer types, and refuses these.
        self.layer_types = list(layer_types or ())
        self.efficient_attention_config = dict(efficient_attention_config or {})

    def validate(self):
        """transformers 5 calls this before it saves; its checks ran in __init__."""
