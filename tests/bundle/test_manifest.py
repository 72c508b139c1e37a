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
        "files": {"decode.pt2": {"sha256": "ab", "bytes": 1}},
    }
    return Manifest(**{**values, **changes})


def test_what_is_saved_is_loaded(tmp_path) -> None:
    manifest().save(tmp_path)
    assert Manifest.load(tmp_path) == manifest()


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
        ("{", r"damaged \(not a manifest\)"),
        ("[]", r"damaged \(not a manifest\)"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), r"damaged"),
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
