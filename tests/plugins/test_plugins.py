"""The plugin objects on a machine without a GPU: creation, fields, serialisation, shapes, formats, workspace."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import plugin_harness
from helpers.plugin_nodes import fields_of, inputs_of

from jet_export.kernels.form import Form
from jet_export.plugins.cubin import parameters
from jet_export.plugins.harness.objects import FLOAT32, FLOAT64, INT32, Harness


@pytest.fixture
def harness(mini) -> Harness:
    return Harness(mini.harness, mini.library)


@pytest.fixture(params=["JetBlock", "Attention"])
def node(request) -> str:
    return request.param


def case_of(built, node: str):
    return next(c for c in built.cases if type(c).__name__ == f"{node}Case")


def plugin_of(harness: Harness, built, node: str) -> int:
    plugin = harness.create(node, fields_of(case_of(built, node)))
    assert plugin, harness.messages()
    return plugin


def test_creators_list_the_nodes_attributes(harness):
    assert harness.field_names("JetBlock") == "num_heads:5 head_k_dim:5 head_v_dim:5 norm_eps:1 form:5 interval:5 "
    assert (
        harness.field_names("Attention")
        == harness.field_names("JetAttention")
        == ("num_heads:5 num_kv_heads:5 head_dim:5 window:5 k_scale:1 v_scale:1 form:5 ")
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": None}, "field num_heads is missing"),
        ({"typo": 3}, "field typo is not known"),
        ({"format": 1}, "field format is not known"),  # belongs to the runtime phase
        ({"num_heads": 2.0}, "field num_heads must be one integer"),
        ({"head_k_dim": -32}, "field head_k_dim is -32, which is out of range"),
        ({"norm_eps": float("nan")}, "field norm_eps is nan, which is out of range"),
        ({"form": int(Form.PREFILL)}, "field form is 0, which is out of range"),
        ({"form": 4}, "form is 4; 1 (decode), 2 (mixed) or 3 (verify) is served"),
        ({"form": int(Form.VERIFY)}, "was built for a model that verifies no drafts (form 3)"),
        ({"interval": 4}, "holds no kernels for the node's dimensions"),  # states written every token
        (
            {"num_heads": 3},
            "holds no kernels for the node's dimensions; it holds: num_heads 2, head_k_dim 32, head_v_dim 48",
        ),
    ],
)
def test_wrong_fields_are_refused(harness, mini, change, message):
    fields = fields_of(case_of(mini, "JetBlock")) | change
    assert harness.create("JetBlock", {k: v for k, v in fields.items() if v is not None}) is None
    assert message in harness.messages()


def test_float_fields_come_in_either_width(harness, mini):
    fields = fields_of(case_of(mini, "Attention"))
    assert harness.create("Attention", fields | {"k_scale": (FLOAT64, 0.5), "v_scale": (FLOAT32, 0.5)})
    assert not harness.create("Attention", fields | {"k_scale": (INT32, 1)})


def test_serialisation_round_trip(harness, mini, node):
    plugin = plugin_of(harness, mini, node)
    inputs = inputs_of(case_of(mini, node), T=70, N=3)
    again = harness.round_trip(node, plugin)
    assert again, harness.messages()
    twice = harness.round_trip(node, harness.c.clone(again))
    attached = harness.c.attach(again)  # to a context of its own
    assert len({plugin, again, twice, attached}) == 4
    for p in (again, twice, attached):
        assert harness.outputs(node, p, inputs) == harness.outputs(node, plugin, inputs)
        assert harness.workspace(node, p, inputs) == harness.workspace(node, plugin, inputs) > 0
    for p in (plugin, again, twice, attached):
        harness.c.destroy(p)


def test_a_renamed_attention_keeps_its_name(harness, mini):
    assert harness.create("JetAttention", fields_of(case_of(mini, "Attention")) | {"window": 41}) is None
    assert "jet::JetAttention layer: this library holds no kernels" in harness.messages()


def test_another_version_or_another_library_is_refused(harness, mini, node):
    plugin = plugin_of(harness, mini, node)
    assert harness.round_trip(node, plugin, alter="format") is None
    assert "field format 2, this library reads 3" in harness.messages()
    assert harness.round_trip(node, plugin, alter="digest") is None
    assert "built with other kernels than this library's" in harness.messages()
    assert harness.create(node, fields_of(case_of(mini, node)), runtime=True) is None
    assert "fields format and digest are missing" in harness.messages()


def test_outputs(harness, mini, node):
    case = case_of(mini, node)
    inputs = inputs_of(case, T=70, N=3)
    width = case.num_heads * (case.head_v_dim if node == "JetBlock" else case.head_dim)
    states = inputs[6:8] if node == "JetBlock" else inputs[2:3]
    assert harness.outputs(node, plugin_of(harness, mini, node), inputs) == [("bfloat16", [70, width]), *states]


def test_the_form_decode_takes_one_token_a_sequence(harness, mini, node):
    case = case_of(mini, node)
    plugin = harness.create(node, fields_of(case) | {"form": int(Form.DECODE)})
    assert harness.configure(node, plugin, inputs_of(case, T=3, N=3)) == 0, harness.messages()
    assert harness.configure(node, plugin, inputs_of(case, T=4, N=3)) != 0
    assert "4 tokens for 3 sequences in the form decode: each has one" in harness.messages()


def test_formats(harness, mini, node):
    plugin = plugin_of(harness, mini, node)
    descs = harness.with_outputs(node, plugin, inputs_of(case_of(mini, node), T=70, N=3))
    assert all(harness.supports(node, plugin, i, descs) for i in range(len(descs)))
    for i, (dtype, shape) in enumerate(descs):
        for other in {"float32", "float16", "bfloat16", "float8_e4m3fn", "int32"} - {dtype}:
            changed = [*descs[:i], (other, shape), *descs[i + 1 :]]
            assert not harness.supports(node, plugin, i, changed), (i, other)
        assert not harness.supports(node, plugin, i, descs, layout=1)


def test_configure_refuses_wrong_shapes_and_dtypes(harness, mini, node):
    plugin = plugin_of(harness, mini, node)
    inputs = inputs_of(case_of(mini, node), T=70, N=3)
    assert harness.configure(node, plugin, inputs) == 0, harness.messages()
    for i, (dtype, shape) in enumerate(inputs):
        wrong = [*inputs[:i], (dtype, [*shape[:-1], shape[-1] + 1]), *inputs[i + 1 :]]
        free = node == "Attention" and i == 3  # any width of block_table
        assert (harness.configure(node, plugin, wrong) == 0) == free, i
        assert free or "expected" in (message := harness.messages()) or "multiple of 16" in message
    other = "float32" if inputs[0][0] == "bfloat16" else "bfloat16"
    assert harness.configure(node, plugin, [(other, inputs[0][1]), *inputs[1:]]) != 0
    assert "not built for the node's dtypes" in harness.messages()
    assert harness.configure(node, plugin, inputs_of(case_of(mini, node), T=2, N=3)) != 0
    assert "2 tokens for 3 sequences" in harness.messages()


def test_workspace_covers_every_smaller_batch(harness, mini, node):
    plugin = plugin_of(harness, mini, node)
    case = case_of(mini, node)
    most = harness.workspace(node, plugin, inputs_of(case, T=256, N=40))
    for tokens, sequences in [(256, 1), (200, 39), (40, 40), (7, 7), (1, 1)]:
        assert 0 < harness.workspace(node, plugin, inputs_of(case, T=tokens, N=sequences)) <= most


def test_parameters_of_the_cubins_are_what_is_passed(mini):
    kernels = json.loads((mini.folder / "kernels.json").read_text())
    for i, kernel in enumerate(kernels):
        for image in kernel["images"]:
            cubin = (mini.folder / f"{i}_{image['sm']}.cubin").read_bytes()
            found = parameters(cubin, kernel["name"])
            assert [size for _, size in found] == kernel["parameters"]
            at = 0
            for offset, size in found:  # each at its natural alignment, none overlapping
                at = (at + size - 1) // size * size
                assert offset == at
                at += size


def test_parameters_agree_with_cuobjdump(mini):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton has no cuobjdump")
    cubin = mini.folder / "0_90.cubin"
    text = subprocess.run([tool, "-elf", str(cubin)], capture_output=True, text=True).stdout
    sizes = [int(line.split("Size")[1].split()[1], 16) for line in text.splitlines() if "Ordinal" in line]
    name = json.loads((mini.folder / "kernels.json").read_text())[0]["name"]
    assert sorted(sizes) == sorted(size for _, size in parameters(cubin.read_bytes(), name)) != []


def test_a_library_needs_neither_driver_nor_tensorrt(mini):
    text = subprocess.run(["readelf", "-d", str(mini.library)], capture_output=True, text=True).stdout
    needed = [line for line in text.splitlines() if "NEEDED" in line]
    assert needed and not any(word in line for line in needed for word in ("cuda", "nvinfer", "cudart"))


def test_enqueue_without_a_driver_is_reported(mini, tmp_path):
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver")
    case = case_of(mini, "JetBlock")
    step = {
        "node": "JetBlock",
        "fields": fields_of(case),
        "workspace": 4096,
        "inputs": inputs_of(case, T=8, N=2),
        "addresses": [4096 * (i + 1) for i in range(11)],
        "outputs": [4096 * 20] * 3,
    }
    job = {"harness": str(mini.harness), "library": str(mini.library), "fake": "", "kernels": [], "steps": [step]}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    result = subprocess.run([sys.executable, plugin_harness.__file__, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert found["status"] != 0
    assert "jet::JetBlock: the NVIDIA driver was not found" in found["message"]


def test_reading_a_file_that_is_not_a_cubin():
    with pytest.raises(ValueError, match="not an ELF64 file"):
        parameters(struct.pack("<Q", 0), "kernel")
