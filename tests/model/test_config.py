"""JetNemotronConfig: reading and writing the published config.json, the presets' sizes, and refusals."""

import json

import pytest
from helpers.golden import DATA, MINI_NAMES, load_golden

from jet_export.bundle.memory import parameter_count
from jet_export.model.config import JetNemotronConfig
from jet_export.model.hub import load_config
from jet_export.model.presets import jet_2b, jet_4b
from jet_export.utils.errors import JetExportError


@pytest.mark.parametrize("name", MINI_NAMES)
def test_published_file_survives_a_round_trip(name: str) -> None:
    published = load_golden(DATA / name).config
    config = JetNemotronConfig.from_dict(published)
    assert config.to_dict() == {**published, "head_dim": published.get("head_dim", config.head_dim)}
    assert JetNemotronConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("preset", "billions"), [(jet_2b, 1.965), (jet_4b, 3.960)])
def test_presets_have_the_published_parameter_counts(preset, billions: float) -> None:
    assert parameter_count(preset()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_preset_sizes() -> None:
    c = jet_2b()
    assert (c.head_v_dim, c.jet_value_dim, c.generator_dim) == (256, 3072, 384)  # int(96 * 2.6666666667) is 256
    assert [i for i, k in enumerate(c.layer_types) if k == "attn"] == [14, 19]
    assert [i for i, k in enumerate(c.layer_types) if k == "swa"] == [20, 21]
    c = jet_4b()
    assert (c.head_v_dim, c.jet_value_dim, c.generator_dim) == (256, 4096, 512)
    assert [i for i, k in enumerate(c.layer_types) if k != "jet"] == [5, 16, 17, 19, 20, 21, 22, 25, 27, 32]


def published() -> dict:
    return load_golden(DATA / MINI_NAMES[0]).config


def test_head_dim_of_attention_may_be_absent() -> None:
    values = published()
    del values["head_dim"]
    assert JetNemotronConfig.from_dict(values).head_dim == values["hidden_size"] // values["num_attention_heads"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"layer_types": ["jet", "mamba", "jet", "swa"]}, r"layer_types\[1\] is 'mamba'"),
        ({"layer_types": []}, "layer_types is empty"),
        ({"hidden_size": "wide"}, r"hidden_size is 'wide'\.\nIt takes a whole number"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 40}, "head_dim of the attention layers is 40"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"efficient_attention_config": {"swa": {"window_size": 4}}}, "efficient_attention_config.jet is missing"),
    ],
)
def test_unusable_config_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        JetNemotronConfig.from_dict({**published(), **change})


def test_missing_field_is_named() -> None:
    values = published()
    del values["intermediate_size"]
    with pytest.raises(JetExportError, match="config: intermediate_size is missing"):
        JetNemotronConfig.from_dict(values)


def test_head_v_dim_beyond_the_kernels_is_refused() -> None:
    values = published()
    values["efficient_attention_config"]["jet"]["expand_v"] = 40
    with pytest.raises(JetExportError, match="head_v_dim of the jet layers is 1280"):
        JetNemotronConfig.from_dict(values)


def test_config_files(tmp_path) -> None:
    path = tmp_path / "best.json"
    path.write_text(json.dumps(published()))
    assert load_config(str(path)) == JetNemotronConfig.from_dict(published())
    path.write_text("{")
    with pytest.raises(JetExportError, match="not valid JSON"):
        load_config(str(path))
    with pytest.raises(JetExportError, match=r"no such preset.*\nPresets: jet-tiny, jet-2b, jet-4b"):
        load_config("jet-9b")
