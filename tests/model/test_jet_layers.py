"""JetBlocks whose sizes differ by layer: read, written, run and exported like those with shared sizes."""

import json

import pytest
import torch
from helpers.golden import DATA, MINI_NAMES, load_golden

from jet_export.backends.inductor.package import export_graph
from jet_export.backends.modes import MODES, ONE_ROW
from jet_export.bundle.dtypes import Dtypes
from jet_export.bundle.limits import Limits
from jet_export.bundle.memory import parameter_count
from jet_export.model.cache import state_specs
from jet_export.model.config import JetDims, JetNemotronConfig, expand_v_of
from jet_export.model.jet_nemotron import JetNemotronForCausalLM, random_model
from jet_export.model.presets import jet_2b
from jet_export.plugins.cases import JetBlockCase, model_cases
from jet_export.utils.errors import JetExportError

PAPER = [
    (4, 256, 288),
    (4, 192, 384),
    (4, 128, 576),
    (8, 256, 144),
    (8, 192, 192),
    (8, 128, 288),
    (12, 128, 192),
    (12, 96, 256),
    (12, 64, 384),
]


def mini() -> JetNemotronConfig:
    return JetNemotronConfig.from_dict(load_golden(DATA / MINI_NAMES[1]).config)


def mixed() -> JetNemotronConfig:
    """The mini config, its last jet layer with other sizes."""
    c = mini()
    last = max(i for i, kind in enumerate(c.layer_types) if kind == "jet")
    dims = {i: c.jet_dims(i) for i, kind in enumerate(c.layer_types) if kind == "jet"}
    return c.with_jet_dims({**dims, last: JetDims(4, 16, 48)})


def test_the_published_form_of_v_gives_v_back() -> None:
    for K in range(16, 257, 16):
        for V in range(16, 577, 16):
            ratio = expand_v_of(JetDims(1, K, V))
            assert int(K * ratio) == V
    assert expand_v_of(JetDims(12, 96, 256)) == 2.6666666667  # what the published file says


def test_own_sizes_survive_a_round_trip() -> None:
    c = mixed()
    assert len(c.jet_layers) == 1
    values = json.loads(json.dumps(c.to_dict()))
    assert JetNemotronConfig.from_dict(values) == c
    assert JetNemotronConfig.from_dict(values).to_dict() == c.to_dict()


def test_equal_layers_are_written_as_published() -> None:
    c = jet_2b()
    dims = {i: c.jet_dims(i) for i, kind in enumerate(c.layer_types) if kind == "jet"}
    assert c.with_jet_dims(dims) == c
    one = {i: JetDims(8, 192, 192) for i in dims}
    assert "layers" not in c.with_jet_dims(one).to_dict()["efficient_attention_config"]["jet"]
    c = mixed()
    back = c.with_jet_dims({i: JetDims(8, 192, 192) for i, kind in enumerate(c.layer_types) if kind == "jet"})
    assert "layers" not in back.to_dict()["efficient_attention_config"]["jet"]


def test_states_follow_each_layer() -> None:
    c = mixed()
    shapes = {s.name: s.shape for s in state_specs(c, torch.float32)}
    ((layer, _),) = c.jet_layers
    assert shapes[f"layers.{layer}.recurrent_state"] == (4, 16, 48)
    assert shapes[f"layers.{layer}.conv_state"] == (c.conv_size - 1, 192)
    other = next(i for i, kind in enumerate(c.layer_types) if kind == "jet" and i != layer)
    assert shapes[f"layers.{other}.recurrent_state"] == (c.jet_num_heads, c.head_k_dim, c.head_v_dim)


def test_the_papers_nine_hold_one_state() -> None:
    c = jet_2b()
    sizes = {H * K * V for H, K, V in PAPER}
    assert sizes == {c.jet_num_heads * c.head_k_dim * c.head_v_dim}


def test_checkpoint_round_trip(tmp_path) -> None:
    model = random_model(mixed(), torch.float32, seed=3, max_positions=64)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(mixed())
    model.save_pretrained(tmp_path)
    again = JetNemotronForCausalLM.from_pretrained(tmp_path, torch.float32, max_positions=64)
    assert again.config == model.config
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_chunks_are_the_whole() -> None:
    model = random_model(mixed(), torch.float32, seed=3, max_positions=64)
    ids = torch.randint(model.config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    cache = model.new_cache(2, 64)
    parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 7), (7, 22), (22, 23))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [*MODES, ONE_ROW])
def test_the_graphs_take_each_layers_states(mode: str) -> None:
    model = random_model(mixed(), torch.float32, max_positions=1024)
    limits = Limits(max_batch_size=4, max_seq_len=64, prefill_chunk=16)
    program = export_graph(model, mode, Dtypes(model=torch.float32, kv_cache=torch.float32), limits)
    sizes = [tuple(n.args[11:14]) for n in program.graph.nodes if "jet_block" in str(n.target)]
    c = model.config
    assert sizes == [tuple(c.jet_dims(i)) for i, kind in enumerate(c.layer_types) if kind == "jet"]


def test_plugins_are_compiled_for_every_size() -> None:
    cases = [case for case in model_cases(mixed()) if isinstance(case, JetBlockCase)]
    assert len(cases) == 2
    assert {(case.num_heads, case.head_k_dim, case.head_v_dim) for case in cases} >= {(4, 16, 48)}


def edited(layers: object) -> dict:
    values = mini().to_dict()
    values["efficient_attention_config"]["jet"]["layers"] = layers
    return values


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"99": {"num_heads": 2, "head_dim": 32, "expand_v": 1}}, "names layer 99, which is no jet layer"),
        ({"-1": {"num_heads": 2, "head_dim": 32, "expand_v": 1}}, "names layer -1, which is no jet layer"),
        ({"0": {"num_heads": 2, "head_dim": 40, "expand_v": 1}}, "head_k_dim of jet layer 0 is 40"),
        ({"0": {"num_heads": 2, "head_dim": 32, "expand_v": 40}}, "head_v_dim of jet layer 0 is 1280"),
        ({"0": {"num_heads": 0, "head_dim": 32, "expand_v": 1}}, "num_heads of jet layer 0 is 0"),
        ({"0": {"head_dim": 32, "expand_v": 1}}, "jet.layers.0.num_heads is missing"),
        ([1], r"jet.layers is \[1\]\.\nIt takes an object"),
    ],
)
def test_unusable_sizes_are_refused(layers: object, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        JetNemotronConfig.from_dict(edited(layers))


def test_no_layers_only_where_the_file_says_so() -> None:
    values = {**mini().to_dict(), "layer_types": []}
    with pytest.raises(JetExportError, match="layer_types is empty"):
        JetNemotronConfig.from_dict(values)
    assert JetNemotronConfig.from_dict({**values, "num_hidden_layers": 0}).layer_types == ()
