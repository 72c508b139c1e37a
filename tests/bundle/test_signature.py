"""Signatures: with a trusted key, a bundle loads as it was signed by this key, and in no other state."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jet_export.backends.load import check_bundle, load_engine
from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import MANIFEST, SIGNATURE, Manifest, describe_files
from jet_export.bundle.signature import VARIABLE, check_signature, sign_bundle, trust, trusted_key
from jet_export.bundle.target import host_target
from jet_export.cli import app as cli
from jet_export.model.presets import jet_2b
from jet_export.server.triton.repository import Repository
from jet_export.utils.errors import JetExportError

pytest.importorskip("model_signing")


READ_ONLY = {"inspect", "sign", "simulate"}  # the manifest is all that they read


def write_keys(directory: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """A new private key, and its public one."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    encryption = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "ours")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its engine is never loaded: signatures come before native code."""
    monkeypatch.delenv(VARIABLE, raising=False)
    directory = tmp_path / "bundle"
    (directory / "tokenizer").mkdir(parents=True)
    for name in ("prefill.pt2", "weights.safetensors", "tokenizer/tokenizer.json"):
        (directory / name).write_text(name)
    Manifest(
        model={"name": "mini", "config": jet_2b().to_dict()},
        backend={"name": "inductor", "torch": torch.__version__},
        target=host_target(torch.device("cpu")),
        dtype="float32",
        kv_cache_dtype="float32",
        state_dtype="float32",
        limits=Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=32),
        files=describe_files(directory),
    ).save(directory)
    return directory


@pytest.fixture
def signed(bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Signed, and its key trusted."""
    sign_bundle(bundle, keys[0])
    monkeypatch.setenv(VARIABLE, str(keys[1]))
    return bundle


def test_what_is_signed_is_loaded_and_signing_changes_nothing_else(signed: Path, keys: tuple[Path, Path]) -> None:
    check_signature(signed)
    check_bundle(signed, Manifest.load(signed))
    sign_bundle(signed, keys[0])  # again: over the same files, not over the old signature
    check_signature(signed)
    assert not list(signed.parent.glob(".*"))


def test_without_a_trusted_key_nothing_is_asked(bundle: Path) -> None:
    assert trusted_key() is None
    check_signature(bundle)


def _byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _hash_too(bundle: Path) -> None:
    """What an attacker does: another file, and its hash in the manifest."""
    (bundle / "prefill.pt2").write_text("evil")
    values = json.loads((bundle / MANIFEST).read_text())
    values["files"] = describe_files(bundle)
    (bundle / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: _byte(b / "prefill.pt2"),
        lambda b: _byte(b / "tokenizer/tokenizer.json"),
        lambda b: _byte(b / MANIFEST),
        lambda b: _byte(b / SIGNATURE),
        _hash_too,
        lambda b: (b / "weights.safetensors").unlink(),
        lambda b: (b / "more.so").write_text("x"),
        lambda b: (b / ".gitignore").write_text("x"),  # what model-signing leaves out by default
        lambda b: (b / SIGNATURE).unlink(),
        lambda b: (b / SIGNATURE).write_text(""),
        lambda b: (b / SIGNATURE).write_text("{}"),
        lambda b: (b / SIGNATURE).write_text('{"verificationMaterial": 3}'),
        lambda b: (b / SIGNATURE).write_bytes(b"\xff" * 99),
        lambda b: (b / "prefill.pt2").rename(b / "p") and (b / "prefill.pt2").symlink_to("p"),
    ],
)
def test_any_other_state_is_refused(signed: Path, change) -> None:
    change(signed)
    with pytest.raises(JetExportError, match=r"bundle: not signed.*\nLoad a bundle that its holder has signed"):
        check_signature(signed)


def test_a_signature_of_another_key_or_bundle_is_refused(signed: Path, tmp_path: Path) -> None:
    foreign, _ = write_keys(tmp_path, "theirs")
    whole = (signed / SIGNATURE).read_bytes()
    sign_bundle(signed, foreign)
    with pytest.raises(JetExportError, match=r"not signed by .*ours.pub as it is now"):
        check_signature(signed)
    (signed / "prefill.pt2").write_text("another build")
    manifest = Manifest.load(signed)
    manifest.files = describe_files(signed)
    manifest.save(signed)
    (signed / SIGNATURE).write_bytes(whole)
    with pytest.raises(JetExportError, match="Signature mismatch"):
        check_signature(signed)


@pytest.mark.parametrize("check", [True, False])
def test_no_way_to_load_leaves_it_out(bundle: Path, keys: tuple[Path, Path], monkeypatch, check: bool) -> None:
    from jet_export.runtime.async_llm import AsyncLLM
    from jet_export.runtime.llm import LLM

    monkeypatch.setenv(VARIABLE, str(keys[1]))
    ways = lambda: load_engine(bundle, check), lambda: LLM(bundle), lambda: AsyncLLM(bundle)
    for load in (*ways, lambda: check_bundle(bundle, Manifest.load(bundle))):
        with pytest.raises(JetExportError, match="bundle: not signed, and only bundles signed by"):
            load()


def test_triton_is_told_the_key(signed: Path, keys: tuple[Path, Path]) -> None:
    _, files = Repository(signed).files()
    assert f'key: "trusted_key" value {{ string_value: "{keys[1]}" }}' in files["config.pbtxt"]


def test_the_commands(bundle: Path, keys: tuple[Path, Path], monkeypatch, capsys) -> None:
    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jet-export", *args])
        with pytest.raises(SystemExit) as e:
            cli.main()
        said = capsys.readouterr()
        return int(e.value.code or 0), said.out + said.err

    monkeypatch.setenv(VARIABLE, "")  # what the option sets goes with the test
    for command in (["generate", "--prompt", "x"], ["serve", "--openai"]):
        status, said = run(command[0], str(bundle), *command[1:], "--trusted-key", str(keys[1]))
        assert status == 2 and "not signed, and only bundles" in said, command
    assert run("sign", str(bundle), "--key", str(keys[0])) == (0, f"wrote {bundle / SIGNATURE}\n")
    check_signature(bundle)
    assert os.environ[VARIABLE] == str(keys[1])


def test_every_command_that_loads_a_bundle_takes_the_key() -> None:
    callbacks = [(c.name, c.callback) for c in cli.app.registered_commands if c.callback]
    commands = {name or f.__name__: inspect.signature(f).parameters for name, f in callbacks}
    takes = {name for name, parameters in commands.items() if "trusted_key" in parameters}
    assert takes == {name for name, parameters in commands.items() if "bundle" in parameters} - READ_ONLY


@pytest.mark.parametrize("name", ["nowhere.pem", "ours.pub", "text"])
def test_a_key_that_cannot_sign_is_named_and_nothing_is_written(
    bundle: Path, keys: tuple[Path, Path], name: str
) -> None:
    (bundle.parent / "text").write_text("no key")
    with pytest.raises(JetExportError, match=rf"--key .*{name}: .*\nIt takes an elliptic-curve key in PEM"):
        sign_bundle(bundle, bundle.parent / name)
    assert not (bundle / SIGNATURE).exists() and not list(bundle.parent.glob(".*"))


def test_a_key_with_a_password(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    private, public = write_keys(tmp_path, "locked", b"word")
    with pytest.raises(JetExportError, match=r"locked.pem: cannot sign"):
        sign_bundle(bundle, private)
    with pytest.raises(JetExportError, match=r"locked.pem: cannot sign"):
        sign_bundle(bundle, private, "other")
    sign_bundle(bundle, private, "word")
    monkeypatch.setenv(VARIABLE, str(public))
    check_signature(bundle)


def test_a_key_that_cannot_be_trusted_is_named(signed: Path, keys: tuple[Path, Path], monkeypatch) -> None:
    with pytest.raises(JetExportError, match=r"--trusted-key .*none: no such file"):
        trust(signed / "none")
    monkeypatch.setenv(VARIABLE, str(keys[0]))
    with pytest.raises(JetExportError, match="no public key"):
        check_signature(signed)
    monkeypatch.setenv(VARIABLE, str(signed / "none"))  # fails closed
    with pytest.raises(JetExportError, match=r"JET_TRUSTED_KEY .*none: no such file"):
        check_signature(signed)


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    (bundle / "prefill.pt2").write_text("other")
    with pytest.raises(JetExportError, match=r"prefill.pt2 has changed"):
        sign_bundle(bundle, keys[0])
    assert not (bundle / SIGNATURE).exists()


def test_model_signings_own_command_agrees(signed: Path, keys: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--public_key", str(keys[1])]
    command += ["--signature", str(signed / SIGNATURE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
