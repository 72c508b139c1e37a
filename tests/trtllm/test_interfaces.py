"""The code agrees with the list of TensorRT-LLM's interfaces, the stand-ins have the listed signatures, and the check
can fail."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fake_layers, fake_models, fake_runtime
from helpers.paths import ROOT

from jet_export.trtllm import check_interfaces
from jet_export.trtllm.check_interfaces import HERE, Interfaces, check, compare_source, parse_signature

INTERFACES = Interfaces.load()


def test_the_code_agrees_with_the_list() -> None:
    assert check() == []


def test_every_entry_names_its_source() -> None:
    for entry in INTERFACES.entries:
        assert entry["versions"] and entry["file"].endswith(".py") and entry["line"] >= 0
        if entry["name"].startswith("tensorrt_llm"):
            assert entry["file"].startswith("tensorrt_llm/") and len(entry["commit"]) == 40


FAULTS = [
    ("modeling.py", "reduce_output=False", "reduce_outputs=False", "unexpected keyword argument 'reduce_outputs'"),
    ("modeling.py", "hidden_size=hf.hidden_size, ", "", "missing a required argument: 'hidden_size'"),
    ("modeling.py", "TensorParallelMode.COLUMN", "TensorParallelMode.ROW", "TensorParallelMode.ROW is not listed"),
    ("modeling.py", "import GatedMLP", "import GatedMLP, swiglu", "gated_mlp.swiglu is not listed"),
    ("modeling.py", "            position_ids=position_ids,\n", "1, position_ids=1,\n", "multiple values for argument"),
    ("modeling.py", "bias=True,\n", "biases=True,\n", "missing a required argument: 'bias'|unexpected keyword"),
    ("modeling.py", "        **kwargs: Any,\n    ) -> Tensor:  # [T", "    ) -> Tensor:  # [T", "is called with"),
    ("modeling.py", "tensorrt_llm.__version__", "tensorrt_llm.version", "tensorrt_llm.version is not listed"),
    ("modeling.py", "import tensorrt_llm\n", "import tensorrt_llm._torch as t\n", "import names from it instead"),
    ("mapper.py", 'register_mapper("HF", "Jet', 'register_mapper("HF", 1, "Jet', "too many positional arguments"),
    ("mapper.py", "def preprocess_weights(self, weights:", "def preprocess_weights(self, w:", "missing a required"),
    ("config.py", "def load(self, checkpoint_dir: str, **kwargs: Any)", "def load(self)", "is called with"),
    (
        "config.py",
        "ModelConfig.from_pretrained(checkpoint_dir, **kwargs)",
        "ModelConfig.from_file(checkpoint_dir)",
        "from_file is not listed",
    ),
    ("protocols.py", "tp_size: int", "tp_sizes: int", "MappingLike.tp_size is not in protocols.py"),
    (
        "protocols.py",
        "def get_conv_states(self, layer_idx: int)",
        "def get_conv_states(self, layer: int)",
        "get_conv_states takes \\['layer'\\]",
    ),
    ("protocols.py", "class MappingLike(Protocol)", "class MapLike(Protocol)", "MapLike is not listed"),
]


@pytest.mark.parametrize(("file", "old", "new", "message"), FAULTS)
def test_seeded_faults_are_found(tmp_path, file: str, old: str, new: str, message: str) -> None:
    folder = tmp_path / "trtllm"
    shutil.copytree(HERE, folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    assert any(re.search(message, p) for p in check(folder)), check(folder)


STAND_INS: dict[str, Any] = {
    "Linear": fake_layers.Linear,
    "Embedding": fake_layers.Embedding,
    "RMSNorm": fake_layers.RMSNorm,
    "GatedMLP": fake_layers.GatedMLP,
    "Attention": fake_layers.Attention,
    "forward": fake_layers.Attention.forward,
    "RopeParams.from_config": fake_layers.RopeParams.from_config,
    "register_mapper": fake_models.register_mapper,
    "register_auto_model": fake_models.register_auto_model,
    "DecoderModel": fake_models.DecoderModel,
    "register_config_loader": fake_models.register_config_loader,
    "DecoderModelForCausalLM": fake_models.DecoderModelForCausalLM,
    "load_weights": fake_models.DecoderModelForCausalLM.load_weights,
    "from_pretrained": fake_models.ModelConfig.from_pretrained,
    "register": fake_models.AutoConfig.register,
}


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins_have_the_listed_signatures(name: str) -> None:
    listed = next(s for n, s in INTERFACES.callables.items() if n.endswith(f".{name}"))
    item: Any = STAND_INS[name]
    mine = inspect.signature(item.__init__ if inspect.isclass(item) else item).parameters
    kinds = {n: p.kind for n, p in mine.items() if n != "self"}
    assert kinds == {n: p.kind for n, p in listed.parameters.items()}
    required = {
        n for n, p in mine.items() if (p.default is p.empty and p.kind < 2) or (p.kind == 3 and p.default is p.empty)
    }
    assert required - {"self"} == {
        n for n, p in listed.parameters.items() if p.default is p.empty and p.kind not in (2, 4)
    }


def test_stand_ins_have_the_protocols_members() -> None:
    for protocol, item in {
        "MappingLike": fake_layers.Mapping(),
        "QuantConfigLike": fake_layers.QuantConfig(),
        "ModelConfigLike": fake_models.ModelConfig(),
        "CacheManagerLike": fake_runtime.MambaHybridCacheManager,
        "KVCacheParamsLike": fake_layers.KVCacheParams(True),
        "MambaMetadataLike": fake_runtime.MambaMetadata(torch.zeros(0)),
    }.items():
        for member in INTERFACES.protocols[protocol]:
            assert hasattr(item, member), f"{protocol}.{member}"


def test_stand_ins_refuse(tmp_path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'features'"):
        fake_layers.Linear(4, 4, features=2)  # type: ignore[call-arg]
    linear = fake_layers.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight \(5, 4\)"):
        linear.load_weights([{"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}])
    with pytest.raises(ValueError, match=r"float32 for a parameter"):
        linear.load_weights([{"weight": torch.zeros(4, 4)}])
    with pytest.raises(ValueError, match=r"input \(1, 4\) torch.float32"):
        linear(torch.zeros(1, 4))
    fp8 = fake_layers.Linear(4, 4, bias=False, dtype=torch.bfloat16, quant_config=fake_layers.QuantConfig("FP8"))
    with pytest.raises(KeyError, match="weight_scale"):
        fp8.load_weights([{"weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}])
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'request_ids' and 'is_padding'"):
        fake_runtime.ManagerOf13.get_state_indices(object())  # type: ignore[call-arg, arg-type]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_tensorrt_llm_is_imported_in_one_folder() -> None:
    folders = ("jet_export", "kernels", "model", "plugins", "benchmarks", "examples", "tests")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    importing = {p for p in files if "tensorrt_llm" in imports_of(p)}
    assert importing and all(ROOT / "jet_export/trtllm" in p.parents for p in importing), importing


def test_importing_the_package_imports_neither() -> None:
    code = (
        "import sys, jet_export, jet_export.cli, jet_export.trtllm, jet_export.trtllm.adapt, jet_export.trtllm.fuse\n"
        "assert not {'tensorrt_llm', 'transformers'} & {m.split('.')[0] for m in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_custom_module_dirs() -> None:
    """The printed directory's parent goes on sys.path: nothing else may be in it."""
    out = subprocess.run([sys.executable, "-m", "jet_export.trtllm"], capture_output=True, text=True, check=True)
    path = Path(out.stdout.strip())
    assert [p.name for p in path.parent.iterdir() if p.name != "__pycache__"] == [path.name] == ["jet_nemotron_trtllm"]
    assert imports_of(path / "__init__.py") == {"jet_export"}


def test_comparison_with_a_source_tree(tmp_path) -> None:
    """A tree with the listed signatures is accepted and located; a parameter added or a name gone is named."""
    source = tmp_path / "tensorrt_llm/_torch/modules"
    source.mkdir(parents=True)
    entry = next(e for e in INTERFACES.entries if e["name"].endswith("linear.Linear"))
    listed = ", ".join(parse_signature(entry["signature"]).parameters)
    (source / "linear.py").write_text(f"\n\nclass Linear:\n    def __init__(self, {listed}):\n        pass\n")
    interfaces = Interfaces(entries=[entry])
    found, problems = compare_source(tmp_path, interfaces)
    assert found == [f"{entry['name']}: {source / 'linear.py'}:3"] and problems == []
    (source / "linear.py").write_text(f"class Linear:\n    def __init__(self, {listed}, tile_size):\n        pass\n")
    assert compare_source(tmp_path / "tensorrt_llm", interfaces)[1] == [
        f"{entry['name']}: parameters differ from the list: tile_size"
    ]
    (source / "linear.py").write_text("x = 1\n")
    assert compare_source(tmp_path, interfaces)[1] == [f"{entry['name']}: not found"]


def test_command(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check_interfaces"])
    assert check_interfaces.main() == 0
    assert f"{len(INTERFACES.entries)} interfaces listed; the code keeps to them." in capsys.readouterr().out
