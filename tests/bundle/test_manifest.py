"""manifest.json: what is written is read, copies are equal, and anything else is one message."""

import json

import pytest

from jet_export.bundle.limits import Limits
from jet_export.bundle.manifest import MANIFEST, SCHEMA_VERSION, Manifest
from jet_export.model.presets import jet_2b
from jet_export.utils.errors import JetExportError


def manifest(**changes) -> Manifest:
    values = {
        "model": {"name": "jet-2b", "config": jet_2b().to_dict()},
        "backend": {"name": "inductor"},
        "target": {"device": "cpu", "arch": "x86_64"},
        "dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "state_dtype": "float32",
        "limits": Limits(max_batch_size=2, max_seq_len=64, prefill_chunk=32),
        "build": {"command": ["jet-export", "build", "--model", "jet-2b"]},
        "files": {"decode.pt2": {"sha256": "ab" * 32, "bytes": 1}},
    }
    return Manifest(**{**values, **changes})


def test_what_is_saved_is_loaded(tmp_path) -> None:
    given = manifest(fast_accumulation=True)
    given.save(tmp_path)
    assert Manifest.load(tmp_path) == given != manifest()
    assert Manifest.load(tmp_path).dtypes.fast_accumulation and not manifest().dtypes.fast_accumulation


def test_the_fingerprint_is_what_the_engine_computes(tmp_path) -> None:
    """Not the limits, the command or the place; but every file, the config and the dtypes."""
    same = manifest(limits=Limits(max_batch_size=9, max_seq_len=64, prefill_chunk=32), build={})
    assert same.fingerprint == manifest().fingerprint
    others = [
        manifest(state_dtype="bfloat16"),
        manifest(kv_cache_dtype="fp8"),
        manifest(files={"decode.pt2": {"sha256": "cd", "bytes": 1}}),
        manifest(model={"name": "jet-2b", "config": {**jet_2b().to_dict(), "rope_theta": 5.0}}),
    ]
    assert len({m.fingerprint for m in (manifest(), *others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"not a bundle \(no manifest.json\)"),
        ("{", r"manifest.json: not valid JSON: .*\nBuild the bundle again."),
        ("[]", r"damaged \(not a manifest\)"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), r"manifest.json: model is missing.\nBuild the bundle again."),
        (
            json.dumps({"schema_version": 99, "build": {"command": ["jet-export", "build"]}}),
            rf"schema version 99, this jet-export reads {SCHEMA_VERSION}.\nBuild it again: jet-export build --force",
        ),
    ],
)
def test_anything_else_is_one_message(tmp_path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(JetExportError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("limits.max_batch_size", -1, "limits.max_batch_size is -1.\nIt takes a whole number of at least 1"),
        ("limits.max_seq_len", 2**70, "limits.max_seq_len is 1180591620717411303424.\nIt takes a whole number"),
        ("limits.prefill_chunk", {}, "limits.prefill_chunk is {}.\nIt takes"),
        ("limits", [], "limits is [], not an object"),
        ("limits.more", 1, "limits.more is not known.\nKnown: max_batch_size"),
        ("more", 1, "more is not known.\nKnown: model, backend"),
        ("backend.name", None, "backend.name is None.\nIt takes a string."),
        ("backend.torch", 2.13, "backend.torch is 2.13.\nIt takes a string."),
        ("target.device", "tpu", "target.device is 'tpu'.\nIt takes cpu, cuda."),
        ("target.isa", "avx", "target.isa is 'avx'.\nIt takes a list, each of it a string."),
        ("dtype", "int8", "dtype is 'int8'.\nIt takes bfloat16, float16, float32."),
        ("state_interval", 0, "state_interval is 0.\nIt takes a whole number of at least 1, at most 1024."),
        ("fast_accumulation", 1, "fast_accumulation is 1.\nIt takes true or false."),
        ("rollback", True, "rollback is True.\nIt takes"),
        ("quantization.fp8.x.weight_scale", 0, "quantization.fp8.x.weight_scale is 0.\nIt takes a number above 0."),
        ("quantization.kv_scales.x", [1], "quantization.kv_scales.x is too short"),
        ("quantization.kv_scales.x", [1, 0.0], "quantization.kv_scales.x[1] is 0.0.\nIt takes a number above 0."),
        ("quantization.kept", [["a"]], "quantization.kept is too short"),
        ("build.command", "jet-export", "build.command is 'jet-export'.\nIt takes a list"),
        ("warnings", {}, "warnings is {}.\nIt takes a list"),
        ("files", [], "files is [].\nIt takes an object."),
        ("files.decode.pt2", 3, "files.decode.pt2 is 3, not an object"),
        ("model", "jet-2b", "model is 'jet-2b', not an object"),
        ("model.config", {}, "manifest.json: model.config: model_type is None"),
        ("model.config.hidden_size", "1536", "model.config: hidden_size is '1536'.\nIt takes a whole number of"),
    ],
)
def test_what_no_build_writes_is_refused(tmp_path, key: str, value, message: str) -> None:
    quantization = {"fp8": {"x": {"weight_scale": 1.0, "input_scale": 1.0}}, "kept": [], "kv_scales": {}}
    manifest(quantization={**quantization, "calibration_tokens": 1}).save(tmp_path)
    path = tmp_path / MANIFEST
    values = json.loads(path.read_text())
    *tables, last = key.split(".") if "pt2" not in key else ("files", "decode.pt2")
    place = values
    for name in tables:
        place = place[name]
    place[last] = value
    path.write_text(json.dumps(values))
    with pytest.raises(JetExportError) as e:
        Manifest.load(tmp_path)
    assert message in str(e.value) and "manifest.json" in str(e.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../weights.safetensors", "a/../../b", "", "a//b", "./a", "a\0b"])
def test_files_outside_the_bundle_are_refused(tmp_path, name: str) -> None:
    manifest(files={name: {"sha256": "ab" * 32, "bytes": 1}}).save(tmp_path)
    with pytest.raises(JetExportError, match=r"files is .*, which is no path inside the bundle"):
        Manifest.load(tmp_path)


def test_a_hash_that_is_none_is_refused(tmp_path) -> None:
    manifest(files={"a": {"sha256": "ab", "bytes": 1}}).save(tmp_path)
    with pytest.raises(JetExportError, match=r"files.a.sha256 is 'ab', not 64 hexadecimal digits"):
        Manifest.load(tmp_path)


def test_notes_of_later_builds_are_kept(tmp_path) -> None:
    """What a build adds to an object is no reason to refuse the bundle, and is not lost."""
    given = manifest(backend={"name": "tensorrt", "tensorrt": "10.14", "tuning": [1]})
    given.save(tmp_path)
    assert Manifest.load(tmp_path).backend == given.backend
