"""A config.json is honoured or refused: every key is used, has the one value implemented, changes nothing, or warns."""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.golden import DATA, MINI_NAMES, load_golden
from hypothesis import given
from hypothesis import strategies as st

from jet_export.model.config import JetNemotronConfig
from jet_export.model.config_keys import FIXED_IN_ALL, NO_EFFECT, USED, unknown_keys
from jet_export.model.hub import JET_TINY_DIR
from jet_export.model.presets import jet_2b, jet_4b
from jet_export.utils.errors import JetExportError, JetExportWarning

MINI = load_golden(DATA / MINI_NAMES[0]).config  # jet, attn, swa; vocabulary 128
PUBLISHED_ONLY = {  # what the published files have beside what to_dict writes
    "auto_map": {
        "AutoConfig": "configuration_jet_nemotron.JetNemotronConfig",
        "AutoModelForCausalLM": "modeling_jet_nemotron.JetNemotronForCausalLM",
    },
    "transformers_version": "4.51.3",
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read(values: dict[str, Any], directory: Path) -> JetNemotronConfig:
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    return JetNemotronConfig.from_json_file(path)


def jet(**changes: Any) -> dict[str, Any]:
    mixers = MINI["efficient_attention_config"]
    return {"efficient_attention_config": {**mixers, "jet": {**mixers["jet"], **changes}}}


REFUSED = [
    ({"num_hidden_layers": 5}, r"num_hidden_layers is 5, and layer_types names 4 layers\.\nMake them agree"),
    ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; jet_nemotron models are run here with 'silu'"),
    ({"use_mrope": True}, "use_mrope is True"),
    ({"attention_bias": False}, "attention_bias is False; .* with True only"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"use_sliding_window": 1}, "use_sliding_window is 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling .* is not supported"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters .* is not supported"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 1e.06, and 5 in rope_parameters"),
    ({"rope_theta": 0}, "rope_theta is 0.0, not between"),
    ({"rope_theta": "NaN"}, r"rope_theta is 'NaN'\.\nIt takes a finite number"),
    ({"rms_norm_eps": math.nan}, r"rms_norm_eps is nan\.\nIt takes a finite number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0, not between"),
    (jet(norm_eps="inf"), r"config.jet.norm_eps is 'inf'\.\nIt takes a finite number"),
    ({"head_dim": 32.5}, r"head_dim is 32.5\.\nIt takes a whole number"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"tie_word_embeddings": "false"}, r"tie_word_embeddings is 'false'\.\nIt takes true or false"),
    ({"eos_token_id": 128}, r"eos_token_id is 128, not between -1 and 127\.\nThe vocabulary has 128 tokens"),
    ({"bos_token_id": -7}, "bos_token_id is -7"),
    (
        {"eos_token_id": [1, 2.5], "bos_token_id": [2.5]},
        r"bos_token_id is \[2.5\]\.\nIt takes a token id, a list of them, or null",
    ),
    ({"vocab_size": 2**40}, "vocab_size is 1,099,511,627,776, not between 1 and 4,194,304"),
    ({"layer_types": ["jet"] * 10_000, "num_hidden_layers": 10_000}, "num_hidden_layers is 10000, more than 1024"),
    ({"hidden_size": 2**20}, "hidden_size is 1,048,576"),
    ({"hidden_size": 0}, "hidden_size is 0, not between"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    (jet(num_heads=10**9), "jet_num_heads is 1,000,000,000"),
    (jet(dconv_generator_reduction=1000), "num_heads \\* head_v_dim of jet layer 0 is 128, not between 1,000"),
    ({"layer_types": ["jet", 5, "jet", "swa"]}, r"layer_types\[1\] is 5\.\nIt takes a string"),
    ({"quantization_config": "fp8"}, r"quantization_config is 'fp8'\.\nIt takes an object"),
    ({"rope_parameters": 5}, "rope_parameters is 5, not an object"),
    (jet(layers={"x": {"head_dim": 16, "expand_v": 1, "num_heads": 1}}), "layers has 'x', which is no layer number"),
    (
        {"efficient_attention_config": {**MINI["efficient_attention_config"], "swa": {"window_size": -1}}},
        "window_size is -1",
    ),
    ({"efficient_attention_config": 3}, "efficient_attention_config is 3, not an object"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_not_computed_is_refused(change: dict[str, Any], message: str, tmp_path) -> None:
    """And the file is named."""
    with pytest.raises(JetExportError, match=rf"config\.json: (?s:.*){message}"):
        read({**MINI, **change}, tmp_path)


@given(st.sampled_from(sorted(FIXED_IN_ALL)), ANYTHING)
def test_a_fixed_key_has_an_implemented_value_or_is_refused(key: str, value: Any) -> None:
    implemented = value is None or any(value == v and type(value) is type(v) for v in FIXED_IN_ALL[key])
    if implemented or (key == "partial_rotary_factor" and value == 1 and value is not True):
        assert JetNemotronConfig.from_dict({**MINI, key: value}) == JetNemotronConfig.from_dict(MINI)
    else:
        with pytest.raises(JetExportError, match=f"{key} is "):
            JetNemotronConfig.from_dict({**MINI, key: value})


@given(st.sampled_from(sorted(NO_EFFECT)), ANYTHING)
def test_keys_without_effect_change_nothing(key: str, value: Any) -> None:
    assert JetNemotronConfig.from_dict({**MINI, key: value}) == JetNemotronConfig.from_dict(MINI)
    assert unknown_keys({**MINI, key: value}) == []


@given(st.sampled_from(sorted(USED["jet_nemotron"] - {"quantization_config"})), ANYTHING)
def test_any_value_of_a_used_key_is_read_or_refused(key: str, value: Any) -> None:
    """No other exception; what is read is written back and read as the same."""
    try:
        config = JetNemotronConfig.from_dict({**MINI, key: value})
    except JetExportError:
        return
    assert JetNemotronConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_keys_are_named_in_one_warning(tmp_path) -> None:
    values = {**MINI, **jet(use_output_gate=False), "logit_softcap": 30.0}
    with pytest.warns(JetExportWarning) as seen:
        config = read(values, tmp_path)
    (warning,) = seen
    names = "logit_softcap, efficient_attention_config.jet.use_output_gate"
    assert f"config.json: not known here, and ignored: {names}." in str(warning.message)
    assert config == JetNemotronConfig.from_dict(MINI)


@pytest.mark.parametrize("preset", [jet_2b, jet_4b])
def test_published_configs_load_without_a_warning(preset, tmp_path) -> None:
    with no_warning():
        published = {**preset().to_dict(), **PUBLISHED_ONLY}
        del published["head_dim"]
        assert read(published, tmp_path) == preset()
        JetNemotronConfig.from_json_file(JET_TINY_DIR / "config.json")
        read(MINI, tmp_path)


def test_what_transformers_5_writes_is_read(tmp_path) -> None:
    """rope_parameters in place of rope_theta, and dtype in place of torch_dtype."""
    values = {**MINI, "dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    del values["rope_theta"], values["torch_dtype"]
    with no_warning():
        config = read(values, tmp_path)
    assert config.rope_theta == 5e5
    assert config.to_dict()["rope_theta"] == 5e5


def test_null_is_no_token(tmp_path) -> None:
    """It was token 0 once, which is a word of the vocabulary."""
    config = read({**MINI, "eos_token_id": None, "bos_token_id": [7, 9]}, tmp_path)
    assert (config.eos_token_id, config.bos_token_id) == (-1, 7)
    assert config.to_dict()["eos_token_id"] is None
