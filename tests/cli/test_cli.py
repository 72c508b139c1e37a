"""The command line on bad input: one message saying what, where and what to do, exit status 2, nothing written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.eager_bundle import write_mini_config
from helpers.golden import DATA, MINI_NAMES, load_golden

from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import Manifest, describe_files
from jet_export.bundle.target import host_target
from jet_export.cli import app as cli
from jet_export.utils.version import __version__


def run(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["jet-export", *args])
    with pytest.raises(SystemExit) as e:
        cli.main()
    out = capsys.readouterr()
    return int(e.value.code or 0), out.out, out.err


def refused(monkeypatch, capsys, *args: str) -> str:
    status, _, err = run(monkeypatch, capsys, *args)
    assert status == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bundle(workdir) -> Path:
    """A bundle whose engine is never loaded: all checks come before native code."""
    import torch

    directory = workdir / "bundle"
    directory.mkdir()
    for name in ("prefill.pt2", "decode.pt2", "weights.safetensors"):
        (directory / name).write_bytes(name.encode())
    config = load_golden(DATA / MINI_NAMES[1]).config
    Manifest(
        model={"name": "mini", "config": config},
        backend={"name": "inductor", "torch": torch.__version__},
        target=host_target(torch.device("cpu")),
        dtype="float32",
        kv_cache_dtype="float32",
        state_dtype="float32",
        limits=Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=32),
        build={"command": ["jet-export", "build", "--model", "mini.json"]},
        files=describe_files(directory),
    ).save(directory)
    return directory


def edit(bundle: Path, **changes) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_version(monkeypatch, capsys) -> None:
    import torch
    import triton

    monkeypatch.setenv("JET_COMMIT", "abc123")
    status, out, _ = run(monkeypatch, capsys, "--version")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    assert status == 0
    first, second, third = out.splitlines()
    assert first == f"jet-export {__version__} (commit abc123)"
    assert second.startswith(f"torch {torch.__version__}, Triton {triton.__version__}, CUDA ")
    assert third.startswith(f"GPU {gpu}, Python 3.")


@pytest.mark.parametrize(("words", "expected"), [("", "verify"), ("ben", "bench"), ("build --ran", "--random-weights")])
def test_shell_completion(words: str, expected: str) -> None:
    """At a tab, bash runs the command with the line typed so far in its environment."""
    line = ["jet-export", *(words.split() or [""])]
    asked = {"_JET_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(line) - 1)}
    done = in_process(**asked)
    assert expected in done.stdout.split(), done.stderr


def test_the_completion_script_is_shown() -> None:
    done = in_process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0 and "_JET_EXPORT_COMPLETE=complete_bash" in done.stdout


def in_process(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, from which typer takes its name."""
    code = "import sys; sys.argv[0] = 'jet-export'; from jet_export.cli.app import main; main()"
    command, env = [sys.executable, "-c", code, *words], {**os.environ, **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_help_of_each_command_shows_an_example(monkeypatch, capsys) -> None:
    for command in ("build", "verify", "generate", "inspect", "search"):
        status, out, _ = run(monkeypatch, capsys, command, "--help")
        assert status == 0
        assert f"Example: jet-export {command}" in out


def test_dry_run_prints_the_plan_and_writes_nothing(workdir, monkeypatch, capsys) -> None:
    write_mini_config(workdir)
    status, out, _ = run(monkeypatch, capsys, "build", "--model", "mini.json", "--random-weights", "--dry-run")
    assert status == 0
    for word in ("inductor (auto: verified and run on x86_64", "limits", "memory", "disk", "bundles/mini-bf16"):
        assert word in out
    assert sorted(p.name for p in workdir.iterdir()) == ["mini.json"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "jet-9b"], "--model jet-9b: no such preset, directory or hub id"),
        (["--model", "./nowhere"], "--model ./nowhere: no such preset"),
        (["--model", "jet-2b", "--checkpoint", "nowhere"], "--checkpoint nowhere: no such directory"),
        (["--model", "jet-2b", "--random-weights", "--backend", "onnxruntime"], "--backend onnxruntime: not known"),
        (["--model", "jet-2b", "--random-weights", "--dtype", "int4"], "--dtype int4: not known"),
        (["--model", "jet-2b", "--random-weights", "--max-seq-len", "0"], "--max-seq-len 0: must be at least 1"),
        (["--model", "jet-2b", "--random-weights", "--max-batch-size", "-1"], "--max-batch-size -1"),
        (["--model", "jet-2b", "--random-weights", "--device", "tpu"], "--device tpu: not known"),
        (["--model", "jet-2b", "--random-weights", "--fp8", "--dtype", "float32"], "--fp8 works on a bfloat16 model"),
        (["--model", "jet-2b", "--random-weights", "--kv-cache-dtype", "int8"], "--kv-cache-dtype int8"),
    ],
)
def test_build_refuses(workdir, monkeypatch, capsys, args: list[str], message: str) -> None:
    assert re.search(message, refused(monkeypatch, capsys, "build", *args))
    assert list(workdir.iterdir()) == []


def test_cuda_without_a_gpu(workdir, monkeypatch, capsys) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    err = refused(monkeypatch, capsys, "build", "--model", "jet-2b", "--random-weights", "--device", "cuda")
    assert "--device cuda: this torch is a CPU build" in err
    assert "--device cpu" in err


def test_hub_without_network(workdir, monkeypatch, capsys) -> None:
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    err = refused(monkeypatch, capsys, "build", "--model", "jet-2b")
    assert "jet-ai/Jet-Nemotron-2B could not be downloaded" in err
    assert "--checkpoint DIR" in err
    assert list(workdir.iterdir()) == []


def test_plan_of_a_hub_id_downloads_the_config_alone(workdir, monkeypatch, capsys) -> None:
    import huggingface_hub

    config = write_mini_config(workdir)
    asked = []

    def download(*args) -> str:
        asked.append(args)
        return str(config)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("downloaded"))
    status, out, _ = run(monkeypatch, capsys, "build", "--model", "someone/jet-mini", "--dry-run")
    assert status == 0
    assert asked == [("someone/jet-mini", "config.json")]
    assert "hub someone/jet-mini" in out
    assert "download" in out


def test_config_without_weights(workdir, monkeypatch, capsys) -> None:
    write_mini_config(workdir)
    err = refused(monkeypatch, capsys, "build", "--model", "mini.json")
    assert "--model mini.json: an architecture without weights" in err
    assert "--random-weights" in err


def test_damaged_checkpoint_leaves_nothing(workdir, monkeypatch, capsys) -> None:
    checkpoint = load_golden(DATA / MINI_NAMES[0]).save_checkpoint(workdir / "ckpt")
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:1000])
    err = refused(monkeypatch, capsys, "build", "--model", "ckpt", "--output", "out/bundle")
    assert "model.safetensors: damaged or truncated" in err
    assert not (workdir / "out/bundle").exists()
    assert not list(workdir.glob("out/.*"))


def test_unknown_layer_type_in_a_checkpoint(workdir, monkeypatch, capsys) -> None:
    golden = load_golden(DATA / MINI_NAMES[0])
    golden.config["layer_types"][2] = "mamba"
    golden.save_checkpoint(workdir / "ckpt")
    err = refused(monkeypatch, capsys, "build", "--model", "ckpt")
    assert "layer_types[2] is 'mamba'" in err


def test_calibration_that_is_not_utf8(workdir, monkeypatch, capsys) -> None:
    write_mini_config(workdir)
    (workdir / "text").write_bytes(b"ok \xff\xfe")
    err = refused(
        monkeypatch, capsys, "build", "--model", "mini.json", "--random-weights", "--fp8", "--calibration", "text"
    )
    assert "text: not UTF-8" in err
    assert not list(workdir.glob("bundles/*"))


def test_changed_byte(bundle, monkeypatch, capsys) -> None:
    data = bytearray((bundle / "decode.pt2").read_bytes())
    data[3] ^= 1
    (bundle / "decode.pt2").write_bytes(data)
    err = refused(monkeypatch, capsys, "generate", str(bundle), "--prompt", "x")
    assert "decode.pt2 has changed since it was built" in err
    assert "jet-export build --model mini.json --force" in err


def test_missing_and_added_files(bundle, monkeypatch, capsys) -> None:
    (bundle / "extra.so").write_bytes(b"code")
    assert "extra.so is not in the manifest" in refused(monkeypatch, capsys, "verify", str(bundle))
    (bundle / "extra.so").unlink()
    (bundle / "prefill.pt2").unlink()
    assert "prefill.pt2 is missing" in refused(monkeypatch, capsys, "verify", str(bundle))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema version 99, this jet-export reads "),
        ({"target": {"device": "cpu", "arch": "riscv64"}}, "built for riscv64"),
        ({"backend": {"name": "inductor", "torch": "1.0.0"}}, "built with torch 1.0.0"),
        ({"limits": {"max_batch": 3}}, "limits.max_batch_size is missing"),
    ],
)
def test_bundle_of_another_kind(bundle, monkeypatch, capsys, changes: dict, message: str) -> None:
    edit(bundle, **changes)
    assert message in refused(monkeypatch, capsys, "generate", str(bundle), "--prompt", "x")


def test_bundle_for_instructions_that_this_cpu_lacks(bundle, monkeypatch, capsys) -> None:
    import torch

    edit(bundle, target={**host_target(torch.device("cpu")), "isa": ["avx9000"]})
    assert "built for a CPU with avx9000" in refused(monkeypatch, capsys, "generate", str(bundle), "--prompt", "x")


def test_no_bundle(workdir, monkeypatch, capsys) -> None:
    assert "nowhere: not a bundle" in refused(monkeypatch, capsys, "inspect", "nowhere")
    (workdir / "manifest.json").write_text("{")
    assert "manifest.json: not valid JSON" in refused(monkeypatch, capsys, "inspect", ".")


def test_prompts(bundle, workdir, monkeypatch, capsys) -> None:
    assert "one of the two" in refused(monkeypatch, capsys, "generate", str(bundle))
    (workdir / "p.txt").write_bytes(b"caf\xe9\n")
    err = refused(monkeypatch, capsys, "generate", str(bundle), "--prompts", "p.txt")
    assert "p.txt: not UTF-8 (byte 3)" in err
    (workdir / "p.txt").write_bytes(b"")
    assert "no prompt in it" in refused(monkeypatch, capsys, "generate", str(bundle), "--prompts", "p.txt")
    assert "No such file" in refused(monkeypatch, capsys, "generate", str(bundle), "--prompts", "q.txt")
    assert "--prompt: not UTF-8" in refused(monkeypatch, capsys, "generate", str(bundle), "--prompt", "a\udcff")


def test_inspect_before_building(workdir, monkeypatch, capsys) -> None:
    status, out, _ = run(monkeypatch, capsys, "inspect", "--model", "jet-4b", "--batch", "64", "--context", "65536")
    assert status == 0
    assert "3,960" in out
    assert "KV cache, full attention" in out
    assert "one of the two" in refused(monkeypatch, capsys, "inspect")
    assert "must be at least 1" in refused(monkeypatch, capsys, "inspect", "--model", "jet-4b", "--batch", "-2")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "0"], "inspect --batch 0: must be at least 1"),
        (["--context", "0"], "inspect --context 0: must be at least 1"),
        (["--prefill-chunk", "0"], "inspect --prefill-chunk 0: must be at least 1"),
        (["--prefill-chunk", "-5"], "inspect --prefill-chunk -5: must be at least 1"),
        (["--state-dtype", "foo"], "inspect --state-dtype foo: not known"),
        (["--context", "64", "--tpot-ms", "20", "--state-dtype", "foo"], "inspect --state-dtype foo: not known"),
        (["--context", "64", "--tpot-ms", "20", "--kv-cache-dtype", "foo"], "inspect --kv-cache-dtype foo: not known"),
        (["--measured", "bench.json"], "inspect --measured: belongs to --tpot-ms"),
    ],
)
def test_inspect_refuses(workdir, monkeypatch, capsys, args: list[str], message: str) -> None:
    assert message in refused(monkeypatch, capsys, "inspect", "--model", "jet-4b", *args)


def test_inspect_of_a_bundle_refuses(bundle, monkeypatch, capsys) -> None:
    for flag in ("--batch", "--context"):
        assert f"inspect {flag} 0" in refused(monkeypatch, capsys, "inspect", str(bundle), flag, "0")
    for words in (["--prefill-chunk", "16"], ["--fp8"], ["--kv-cache-dtype", "fp8"], ["--state-dtype", "bfloat16"]):
        err = refused(monkeypatch, capsys, "inspect", str(bundle), *words)
        assert f"inspect {words[0]}: belongs to --model" in err


def test_importing_is_light() -> None:
    """transformers, modelopt and tensorrt are imported only where they are used."""
    code = (
        "import sys, jet_export, jet_export.model.jet_nemotron\n"
        "import jet_export.runtime.llm, jet_export.build, jet_export.cli\n"
        "print([m for m in ('transformers', 'modelopt', 'tensorrt', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_key_is_one_line_of_warning(workdir, monkeypatch, capsys) -> None:
    golden = load_golden(DATA / MINI_NAMES[0])
    golden.config["logit_softcap"] = 30.0
    golden.save_checkpoint(workdir / "ckpt")
    status, _, err = run(monkeypatch, capsys, "build", "--model", "ckpt", "--device", "cpu", "--dry-run")
    assert status == 0
    assert set(err.splitlines()) == {
        "warning: ckpt/config.json: not known here, and ignored: logit_softcap. "
        "Logits are wrong if the model depends on it."
    }


def test_a_plan_is_refused_for_tensors_that_do_not_belong(workdir, monkeypatch, capsys) -> None:
    golden = load_golden(DATA / MINI_NAMES[0])
    golden.weights["model.layers.9.mlp.up_proj.weight"] = golden.weights["model.layers.0.mlp.up_proj.weight"].clone()
    golden.save_checkpoint(workdir / "ckpt")
    assert "is of layer 9" in refused(monkeypatch, capsys, "build", "--model", "ckpt", "--dry-run")
