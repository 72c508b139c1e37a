"""The space file: what it takes, what it refuses, and the points that it spans."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.eager_bundle import mini_config
from helpers.fake_executor import prepared

from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.model.presets import jet_2b, jet_4b, qwen3_5_2b
from jet_export.search.constraints import Constraints
from jet_export.search.machine import usable_memory
from jet_export.search.points import Point, all_points, count_points
from jet_export.search.space import SPACES, default_space, layout_of, read_space
from jet_export.utils.errors import JetExportError


def space_of(tmp_path: Path, text: str, config=None):
    path = tmp_path / "space.toml"
    path.write_text(text)
    return read_space(path, config or mini_config())


def test_the_default_space_is_the_papers_table() -> None:
    preset = jet_2b()
    space = read_space(default_space("jet-2b"), preset)
    assert len(space.sizes) == 9
    constraints = Constraints(preset=preset, space=space, dtype=torch.bfloat16, device_bytes=None)
    points = list(all_points(space, preset))
    assert [constraints.refusal(p) for p in points] == [None] * 9
    caches = {constraints.cache_bytes(p.config(preset, space), p) for p in points}
    assert caches == {constraints.allowed_cache_bytes(points[0])}  # one state, and the preset's own
    taps = {constraints.memory(p.config(preset, space), p, batch=1).conv_states for p in points}
    assert len(taps) > 1  # which is why the bound leaves them out
    assert JetDims(12, 96, 256) in space.sizes and (space.target_batch, space.target_context) == (128, 65536)


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.toml")) + sorted(Path("benchmarks/spaces").glob("*.toml")))
def test_every_committed_space_is_read(path: Path) -> None:
    if path.name == "paper_scores.toml":
        return
    from jet_export.model.hub import load_config

    preset = load_config("jet-tiny") if "tiny" in path.name else jet_2b()
    preset = qwen3_5_2b() if "deltanet" in path.name else preset
    assert count_points(read_space(path, preset), preset) > 1


def test_shapes_of_gated_delta_nets(tmp_path) -> None:
    """Key heads are an axis; the state bounds K, V and H, and value heads are a multiple of key heads."""
    preset = qwen3_5_2b()
    space = read_space(default_space("qwen3.5-2b", preset), preset)
    constraints = Constraints(preset=preset, space=space, dtype=torch.bfloat16, device_bytes=None)
    points = list(all_points(space, preset))
    assert len(points) == count_points(space, preset) == 2 * 3 * 3
    refused = [p for p in points if constraints.refusal(p)]
    assert {p.sizes for p in refused} == {(JetDims(16, 128, 256),)} and len(refused) == 3
    config = next(p for p in points if p.key_heads == 4 and p.sizes == (JetDims(16, 64, 256),)).config(preset, space)
    assert (config.key_heads, config.jet_dims(0)) == (4, JetDims(16, 64, 256))
    assert JetNemotronConfig.from_dict(config.to_dict()) == config
    assert len({p.label(space, preset) for p in points}) == len(points)
    odd = space_of(tmp_path, '[jet]\nsizes = ["preset", "128x128x24"]\n', preset)
    constraints = replace(constraints, space=odd)
    assert [constraints.refusal(p) for p in all_points(odd, preset)][1] == (
        "16 key heads beside 24 value heads, convolution static. Value heads are a multiple of key heads, which only a "
        "static convolution may have fewer of"
    )


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("[jet]\nnum_key_heads = 2", None, "jet.num_key_heads: JetBlocks share no key heads"),
        ('[jet]\nshare = "each"', qwen3_5_2b(), "jet.share: a Qwen3.5's Gated DeltaNets have one size for all"),
        ("[attention]\nlayout = {swa = 1}", qwen3_5_2b(), "attention.layout: a Qwen3.5 has no sliding windows"),
    ],
)
def test_what_gated_delta_nets_do_not_have(tmp_path, text: str, config, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        space_of(tmp_path, text, config)


def test_jet_tiny_has_a_space_of_its_own() -> None:
    from jet_export.model.hub import load_config

    preset = load_config("jet-tiny")
    space = read_space(default_space("jet-tiny"), preset)
    constraints = Constraints(preset=preset, space=space, dtype=torch.bfloat16, device_bytes=None)
    assert [constraints.refusal(p) for p in all_points(space, preset)] == [None] * count_points(space, preset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[jet", "not valid TOML"),
        ("[jets]\nsizes = []", r"jets is not known.\nKnown: jet, precision"),
        ("[jet]\nsize = 3", "jet.size is not known"),
        ('[jet]\nsizes = ["96x256"]', "jet.sizes holds '96x256'"),
        ('[jet]\nsizes = ["0x16x2"]', "jet.sizes holds '0x16x2'"),
        ("[jet]\nsizes = []", "jet.sizes is empty"),
        ('[jet]\nsizes = ["preset"]\nnum_heads = [2]', "jet.sizes and jet.num_heads exclude each other"),
        ("[jet]\nhead_k_dim = [0]", "jet.head_k_dim is 0.\nIt takes a whole number of at least 1"),
        ("[jet]\nhead_k_dim = [true]", "jet.head_k_dim is True"),
        ('[jet]\nshare = "some"', "jet.share is 'some'"),
        ("[jet]\nshare = [[0, 0]]", "names a layer twice"),
        ("[jet]\nshare = [[99]]", "one that is not there.\nLayers are 0 to"),
        ("[precision]\nfp8 = [1]", "precision.fp8 is 1.\nIt takes true or false"),
        ('[precision]\nstate_dtype = ["int8"]', "precision.state_dtype is 'int8'.\nIt takes float32, bfloat16"),
        ("[attention]\nwindow_size = [0]", "attention.window_size is 0"),
        ('[attention]\nlayout = ["jj"]', "attention.layout holds 'jj'.\nIt takes 4 letters"),
        ('[attention]\nlayout = ["jjjx"]', "attention.layout holds 'jjjx'"),
        ("[attention]\nlayout = {attn = 9}", "attention.layout.attn is 9.\nIt takes counts from 0 to 4"),
        ("[attention]\nlayout = {jet = 2}", "attention.layout counts attn and swa only"),
        ('[constraints]\ncache_bytes = "some"', "constraints.cache_bytes is 'some'"),
        ("[constraints]\nparameters = [2, 1]", r"constraints.parameters is \[2, 1\]"),
        ("[constraints]\ndecode_ms = -1", "constraints.decode_ms is -1"),
        ("[constraints]\ndecode_ms = nan", "constraints.decode_ms is nan"),
        ("[measure]\nbatch = [1]\n[target]\nbatch = 2", "target.batch 2 is not measured.\nAdd it to measure.batch"),
        ('[measure]\nfill = "zeros"', "measure.fill is 'zeros'.\nIt takes auto, prefill, synthetic"),
        (
            '[measure]\nfill = ["prefill", "synthetic"]',
            r"measure.fill is \['prefill', 'synthetic'\].\nIt takes auto",
        ),
        ("[measure]\nlayers = [2, 4]", r"measure.layers is \[2, 4\].\nIt takes a whole number"),
        ("[measure]\nbatch = [1, 2]\n[target]\nbatch = [1, 2]", r"target.batch is \[1, 2\].\nIt takes a whole number"),
        ("[measure]\nnew_tokens = 1", "measure.new_tokens is 1.\nIt takes a whole number of at least 2"),
        ("[measure]\nbatch = 99999999999", "measure.batch is 99999999999"),
        ("[jet]\nshare = [[[1]]]", "jet.share names a layer twice, or one that is not there"),
        ('[jet]\nsizes = ["96x256x99999999999999999999"]', "jet.sizes holds '96x256x99999999999999999999'"),
        (
            "[jet]\nhead_k_dim = [1000000]",
            "jet.head_k_dim is 1000000.\nIt takes a whole number of at least 1, at most 999999",
        ),
        (
            "[attention]\nlayout = {attn = [3], swa = [2, 3]}",
            "at least 3 attn and 2 swa layers do not fit the model's 4",
        ),
        ("[constraints]\nparameters = [nan, 5]", r"constraints.parameters is \[nan, 5\]"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, text: str, message: str) -> None:
    with pytest.raises(JetExportError, match="--space .*space.toml: .*" + re.sub("\n", "\n", message)):
        space_of(tmp_path, text)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(JetExportError, match=r"nowhere.toml: no such file.\ndocs/guides/search.md"):
        read_space(tmp_path / "nowhere.toml", mini_config())


def test_dimensions_may_be_crossed(tmp_path) -> None:
    space = space_of(tmp_path, "[jet]\nhead_k_dim = [16, 32]\nhead_v_dim = [16, 48, 64]\nnum_heads = [2]")
    assert set(space.sizes) == {JetDims(2, k, v) for k in (16, 32) for v in (16, 48, 64)}


TEXT = '[jet]\nsizes = ["16x32x2", "32x16x2", "16x16x4"]\n'


def test_layers_that_share_have_one_choice(tmp_path) -> None:
    config = mini_config()
    jets = [i for i, kind in enumerate(config.layer_types) if kind == "jet"]
    every = {"all": 3, "each": 3 ** len(jets), [jets[:1], jets[1:]].__repr__(): 3**2}
    for share, n in every.items():
        value = f'"{share}"' if share in ("all", "each") else share
        space = space_of(tmp_path, TEXT + f"share = {value}\n")
        points = list(all_points(space, config))
        assert len(points) == len(set(points)) == n
        for p in points:
            dims = p.jet_dims(space)
            assert set(dims) == set(jets)
            if share == "all":
                assert len(set(dims.values())) == 1
    rest = {tuple(p.jet_dims(space)[i] for i in jets[1:]) for p in points}
    assert rest == {(d,) * len(jets[1:]) for d in space.sizes}


def test_sizes_of_attention_layers_are_no_choice(tmp_path) -> None:
    config = mini_config()
    alike = TEXT + 'share = "each"\n[attention]\nlayout = ["ajja", "aaaa"]\nwindow_size = [64, 128]\n'
    space = space_of(tmp_path, alike)
    points = list(all_points(space, config))
    assert count_points(space, config) == len(points) == 9 + 1
    labels = [p.label(space, config) for p in points]
    assert labels[0] == "16x32x2 window 64 ajja" and labels[1] == "16x32x2+32x16x2 window 64 ajja"
    assert labels[-1] == "attention window 64 aaaa"
    assert points[1].jet_dims(space) == {1: JetDims(2, 16, 32), 2: JetDims(2, 32, 16)}


@pytest.mark.parametrize("share", ['"all"', '"each"', "[[0, 1], [2, 3]]", "[[0], [1, 2, 3]]"])
@pytest.mark.parametrize("layout", ['["jsja", "jjjj", "aajj", "ssss"]', "{attn = [0, 2, 4], swa = [0, 1, 3]}"])
def test_points_are_counted_as_they_are_listed(tmp_path, share: str, layout: str, monkeypatch) -> None:
    more = '[precision]\nfp8 = [true, false]\nstate_dtype = ["float32", "bfloat16"]\nkv_cache_dtype = ["auto", "fp8"]\n'
    text = TEXT + f"share = {share}\n{more}[attention]\nlayout = {layout}\nwindow_size = [64, 128]\n"
    space, config = space_of(tmp_path, text), mini_config()
    listed = sum(1 for _ in all_points(space, config))
    assert count_points(space, config) == listed
    monkeypatch.setattr("jet_export.search.points.MAX_COUNTED_LAYOUTS", 0)
    assert count_points(space, config) >= listed


def test_a_jet_layer_in_no_group_is_refused(tmp_path) -> None:
    search = prepared(tmp_path, TEXT + "share = [[0]]\n[measure]\nbatch = 1\ncontext = 128\n")
    reasons = {search.assess(p).refused for p in all_points(search.spec.space, search.spec.preset)}
    assert len(reasons) == 1 and "is a jet layer and in no group of jet.share" in (reasons.pop() or "")


def test_layouts_under_a_count_are_all_of_them(tmp_path) -> None:
    space = space_of(tmp_path, '[jet]\nsizes = ["preset"]\n[attention]\nlayout = {attn = [0, 1], swa = 1}')
    layouts = [p.layout for p in all_points(space, mini_config())]
    assert len(layouts) == len(set(layouts)) == 4 + 4 * 3
    assert {(x.count("a"), x.count("s")) for x in layouts} == {(0, 1), (1, 1)}
    assert count_points(space, mini_config()) == len(layouts)


def test_what_a_layout_does_not_use_is_no_choice(tmp_path) -> None:
    text = '[precision]\nkv_cache_dtype = ["auto", "fp8"]\n[attention]\nlayout = ["jjjj"]\nwindow_size = [64, 128]'
    points = list(all_points(space_of(tmp_path, text), mini_config()))
    assert len(points) == 1


def test_the_bound_is_the_presets_at_the_points_precision(tmp_path) -> None:
    text = '[precision]\nstate_dtype = ["float32", "bfloat16"]\nkv_cache_dtype = ["auto", "fp8"]\n'
    preset = jet_4b()
    space = space_of(tmp_path, text + "[measure]\nbatch = 2\ncontext = 4096", preset)
    constraints = Constraints(preset=preset, space=space, dtype=torch.bfloat16, device_bytes=None)
    bounds: dict[tuple[str, str], int] = {}
    for p in all_points(space, preset):
        assert constraints.refusal(p) is None
        allowed = constraints.allowed_cache_bytes(p)
        assert allowed is not None and constraints.cache_bytes(p.config(preset, space), p) == allowed
        bounds[p.state_dtype, p.kv_cache_dtype] = allowed
    assert len(set(bounds.values())) == 4
    states = 26 * 16 * 128 * 256
    assert bounds["float32", "auto"] - bounds["bfloat16", "auto"] == 2 * states


def test_labels_tell_points_apart(tmp_path) -> None:
    text = (
        TEXT + 'share = "each"\n[precision]\nstate_dtype = ["float32", "bfloat16"]\n[attention]\nlayout = {swa = [1]}'
    )
    config = mini_config()
    space = space_of(tmp_path, text, config)
    points = list(all_points(space, config))
    assert len({p.label(space, config) for p in points}) == len(points)
    alike = Point(
        sizes=(JetDims(2, 16, 32),) * 4,
        layout=layout_of(config),
        window_size=config.window_size,
        fp8=False,
        state_dtype="float32",
        kv_cache_dtype="auto",
    )
    assert alike.label(space, config).startswith("16x32x2 state fp32")
    two = Point(
        sizes=(JetDims(2, 16, 32),) * 2 + (JetDims(2, 32, 16),) * 2,
        layout="jjjj",
        window_size=0,
        fp8=False,
        state_dtype="float32",
        kv_cache_dtype="auto",
    )
    assert two.label(space, config) == "2*16x32x2+2*32x16x2 state fp32 jjjj"


def test_memory_is_bounded_at_the_largest_pair(tmp_path) -> None:
    text = "[measure]\nbatch = [1, 8]\ncontext = [64, 256]\n[target]\nbatch = 1\ncontext = 64\n"
    search = prepared(tmp_path, text)
    assert search.spec.constraints.device_bytes is not None  # on a CPU too
    point = next(iter(all_points(search.spec.space, search.spec.preset)))
    config = point.config(search.spec.preset, search.spec.space)
    constraints = search.spec.constraints
    target = constraints.memory(config, point, batch=1, context=64).total
    largest = constraints.memory(config, point, batch=8, context=256).total
    assert target < largest
    assert replace(constraints, device_bytes=largest).refusal(point) is None
    refusal = replace(constraints, device_bytes=largest - 1).refusal(point)
    assert refusal is not None and "at batch 8 and 256 tokens" in refusal


def test_a_gpus_memory_is_bounded_as_inspect_does(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100_000))
    assert usable_memory(torch.device("cuda")) == 92_000


def test_the_bound_is_tight(tmp_path) -> None:
    config = mini_config()
    K, V, H = config.head_k_dim, config.head_v_dim, config.jet_num_heads
    search = prepared(tmp_path, f'[jet]\nsizes = ["preset", "{K}x{V + 16}x{H}"]\n[measure]\nbatch = 1\ncontext = 128\n')
    refused = [search.assess(p).refused for p in all_points(search.spec.space, search.spec.preset)]
    assert refused[0] is None
    assert re.search(r"cache .* a sequence at 128 tokens, [\d.]+ % over", refused[1] or "")
