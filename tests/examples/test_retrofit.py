"""examples/retrofit.py on its toy checkpoint: which tensors are copied, trained and saved."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.utils.errors import JetExportError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("retrofit")
    command = [sys.executable, str(EXAMPLES / "retrofit.py"), "--toy", str(directory), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def test_ten_steps_learn(run) -> None:
    import retrofit
    from jet_tiny.model import JetTiny

    lines = [line for line in run[1].splitlines() if line.startswith("step ")]
    assert len(lines) == 10 and all(math.isfinite(float(line.split()[-1])) for line in lines)
    config = JetNemotronConfig.from_json_file(run[0] / "best.json")
    before = retrofit.retrofit(run[0] / "toy-qwen", config, torch.float32, seed=0)
    after = JetTiny(config)
    after.load_state_dict({n: t.float() for n, t in load_file(run[0] / "jet" / "model.safetensors").items()})
    ids = next(retrofit.batches(None, run[0] / "toy-qwen", config, 16, 64, seed=9))
    with torch.no_grad():
        assert retrofit.loss_of(after, ids) < retrofit.loss_of(before, ids) - 0.05


def test_other_tensors_equal_the_checkpoints_bit_for_bit(run) -> None:
    source = load_file(run[0] / "toy-qwen" / "model.safetensors")
    ours = load_file(run[0] / "jet" / "model.safetensors")
    kinds = JetNemotronConfig.from_json_file(run[0] / "jet" / "config.json").layer_types
    kept = [n for n in ours if not (".self_attn." in n and kinds[int(n.split(".")[2])] == "jet")]
    assert {n.split(".")[3] for n in kept if ".layers." in n} >= {"mlp", "self_attn", "input_layernorm"}
    for name in kept:
        assert torch.equal(ours[name], source[name]), name


def test_only_jetblocks_are_trained(run) -> None:
    import retrofit

    config = JetNemotronConfig.from_json_file(run[0] / "best.json")
    before = retrofit.retrofit(run[0] / "toy-qwen", config, torch.float32, seed=0)
    after = load_file(run[0] / "jet" / "model.safetensors")
    trained = {n for n, p in before.named_parameters() if p.requires_grad}
    assert trained == {n for n in after if not retrofit.copied(n, config)}
    for name, tensor in before.checkpoint().items():
        assert torch.equal(tensor, after[name]) == (name not in trained), name


def test_the_saved_checkpoint_is_the_trained_model(run) -> None:
    from jet_tiny.model import JetTiny

    config = JetNemotronConfig.from_json_file(run[0] / "jet" / "config.json")
    assert len(config.jet_layers) == 1  # sizes of their own survive
    trained = JetTiny(config)
    trained.load_state_dict({n: t.float() for n, t in load_file(run[0] / "jet" / "model.safetensors").items()})
    ours = JetNemotronForCausalLM.from_pretrained(run[0] / "jet", torch.float32)
    ids = torch.randint(config.vocab_size, (2, 77), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), trained.eval()(ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'qwen2'"),
        ({"hidden_size": 128}, r"hidden_size is 128, the Jet config has 64.\nSearch from the preset"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, the Jet config has 4"),
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0"),
        ({"tie_word_embeddings": False}, "untied embeddings"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change: dict, message: str) -> None:
    import retrofit

    checkpoint, best = retrofit.make_toy(tmp_path)
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(JetExportError, match=message):
        retrofit.retrofit(checkpoint, JetNemotronConfig.from_json_file(best), torch.float32, 0)


def test_a_missing_tensor_is_named(tmp_path) -> None:
    import retrofit
    from safetensors.torch import save_file

    checkpoint, best = retrofit.make_toy(tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(JetExportError, match=r"tensor model.layers.1.self_attn.k_proj.bias is missing \(1 in all\)"):
        retrofit.retrofit(checkpoint, JetNemotronConfig.from_json_file(best), torch.float32, 0)


def test_a_truncated_checkpoint_names_the_file(tmp_path) -> None:
    import retrofit

    checkpoint, best = retrofit.make_toy(tmp_path)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(JetExportError, match=r"model.safetensors: damaged or truncated"):
        retrofit.retrofit(checkpoint, JetNemotronConfig.from_json_file(best), torch.float32, 0)


def refused(monkeypatch, capsys, *args: str) -> str:
    import retrofit

    monkeypatch.setattr(sys, "argv", ["retrofit.py", "--device", "cpu", *args])
    monkeypatch.setattr(retrofit, "train", lambda *a: pytest.fail("trained"))
    with pytest.raises(SystemExit) as e:
        retrofit.main()
    assert e.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--checkpoint", "nowhere"], "error: --checkpoint: nowhere/config.json cannot be read"),
        (["--text", "nowhere.txt"], "error: --text nowhere.txt: no such file"),
        (["--config", "toy-qwen"], "error: toy-qwen: cannot be read (Is a directory)"),
        (["--text", "FILE"], "error: --text: toy-qwen has no tokenizer.json"),
        (["--batch", "0"], "error: --batch 0: must be at least 1"),
        (["--length", "0"], "error: --length 0: must be at least 1"),
        (["--steps", "0"], "error: --steps 0: must be at least 1"),
        (["--steps", "-1"], "error: --steps -1: must be at least 1"),
        (["--device", "tpu"], "error: --device tpu: not known"),
        (["--output", "FILE"], "error: --output FILE: FILE is a file"),
        (["--toy", "FILE"], "error: --toy FILE: FILE is a file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys, args, message) -> None:
    import retrofit

    monkeypatch.chdir(tmp_path)
    retrofit.make_toy(Path())
    Path("FILE").touch()
    before = sorted(tmp_path.rglob("*"))
    given = ["--checkpoint", "toy-qwen", "--config", "best.json", "--output", "out", *args]
    assert message in refused(monkeypatch, capsys, *given)
    assert sorted(tmp_path.rglob("*")) == before


def test_cuda_on_a_cpu_build_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    err = refused(monkeypatch, capsys, "--toy", str(tmp_path / "toy"), "--device", "cuda")
    assert "error: --device cuda: " in err and not (tmp_path / "toy").exists()


def test_a_text_that_is_not_utf8_is_refused(tmp_path) -> None:
    import retrofit

    (tmp_path / "t").write_bytes(b"caf\xe9")
    with pytest.raises(JetExportError, match=r"t: not UTF-8 \(byte 3\)"):
        next(retrofit.batches(tmp_path / "t", tmp_path, retrofit.toy_config(), 1, 1, 0))
