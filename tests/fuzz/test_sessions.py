"""Session files with anything in them are loaded and continued, or refused with one message; those whose author knows
how the file is hashed, too."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.eager_bundle import eager_llm
from helpers.fuzzing import damaged, fuzz, mutated
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from jet_export.bundle.limits import Limits
from jet_export.runtime.llm import LLM
from jet_export.runtime.sessions import FORMAT, digest
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=1, max_seq_len=64, prefill_chunk=32)
WORDS = ["", "x", "-1", "0", "2", "3", "4", "1e1", "9" * 5000, "٣", "\x00"]
ODD: dict[str, Tensor] = {  # no tokens [T] int64, and no state
    "float": torch.tensor([1.5, torch.nan, torch.inf]),
    "matrix": torch.ones(3, 1, dtype=torch.int64),
    "scalar": torch.tensor(1),
    "empty": torch.zeros(0, dtype=torch.int64),
    "negative": torch.tensor([1, -(2**63), 2]),
    "bool": torch.ones(3, dtype=torch.bool),
    "huge": torch.tensor([1, 2**62, 2]),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return eager_llm(LIMITS)


@pytest.fixture(scope="module")
def saved(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("session") / "s"
    llm.save_session(llm.session([1, 2, 3]), path)
    return path.read_bytes()


def refuses(llm: LLM, path: Path) -> None:
    """Runs, or raises JetExportError."""
    try:
        llm.generate([[5]], 2, session=[llm.load_session(path)])
    except JetExportError as e:
        assert 10 < len(str(e)) < 1500, str(e)[:300]


def test_files(llm: LLM, saved: bytes, tmp_path: Path) -> None:
    path, size = tmp_path / "s", struct.unpack("<Q", saved[:8])[0]
    header, body = json.loads(saved[8 : 8 + size]), saved[8 + size :]

    @given(damaged(saved[: 8 + size]))
    @example(struct.pack("<Q", 2**63))
    @fuzz(30)
    def cut(start: bytes) -> None:
        path.write_bytes(start + body)
        refuses(llm, path)

    @given(mutated(header))
    @fuzz(30)
    def change(values: Any) -> None:
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        refuses(llm, path)

    cut()
    change()


def test_files_that_are_hashed_again(llm: LLM, saved: bytes, tmp_path: Path) -> None:
    """Anybody can hash: what is in the file is checked, too."""
    path = tmp_path / "s"
    path.write_bytes(saved)
    tensors = load_file(path)
    known = {"format": FORMAT, "fingerprint": llm.fingerprint, "held": "3"}
    names = st.sampled_from([*sorted(tensors), "state.x", "x"])
    values = st.sampled_from([None, *sorted(ODD)])

    @given(st.dictionaries(names, values, max_size=2), st.sampled_from(sorted(known)), st.sampled_from([None, *WORDS]))
    @example({}, "fingerprint", None)  # KeyError
    @example({}, "held", "x")  # ValueError
    @example({"tokens": None}, "format", FORMAT)  # KeyError
    @example({"tokens": "matrix"}, "format", FORMAT)  # TypeError
    @example({"tokens": "float"}, "format", FORMAT)
    @fuzz(40)
    def look(changes: dict[str, str | None], key: str, word: str | None) -> None:
        made = {**tensors, **{name: ODD[value].clone() for name, value in changes.items() if value is not None}}
        made = {name: t for name, t in made.items() if changes.get(name, "") is not None}
        metadata = {k: v for k, v in {**known, key: word}.items() if v is not None}
        save_file(made, path, {**metadata, "sha256": digest(made, metadata)})
        refuses(llm, path)

    look()
