"""Sessions: sequences that are continued later, on another machine, or in several directions.

A session is a handle on a snapshot (snapshot.py). Generating with it advances it to the snapshot at the end; a fork is
another handle on the same snapshot. A session file holds one snapshot in safetensors format, with the fingerprint of
its bundle and a sha256 of everything else. A continued session gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.runtime.snapshot import EMPTY, Snapshot, state_shape
from jet_export.utils.errors import JetExportError

FORMAT = "jet-export session 1"
TOKENS, LOGITS = "tokens", "logits"
AGAIN = "Save the session again."


class Session:
    """One conversation, from `LLM.session`, `LLM.load_session` or `LLM.fork`. One request at a time."""

    def __init__(self, snapshot: Snapshot, fingerprint: str) -> None:
        self.snapshot, self.fingerprint = snapshot, fingerprint
        self.busy = False

    @property
    def tokens(self) -> list[int]:
        """Every token so far, prompts and completions."""
        return list(self.snapshot.tokens)

    def fork(self) -> Session:
        """Another session that continues from here. Copies nothing: snapshots are never modified."""
        return Session(self.snapshot, self.fingerprint)

    def check(self, fingerprint: str) -> None:
        if self.fingerprint != fingerprint:
            raise JetExportError("The session belongs to another bundle.", "Continue it with the bundle that made it.")
        if self.busy:
            raise JetExportError("The session is in use by another request.", "Wait for it, or fork the session.")


def save_session(session: Session, path: str | Path) -> None:
    """Write a session to a file atomically. Raises JetExportError."""
    path, snapshot = Path(path), session.snapshot
    tensors = {f"state.{name}": t.cpu().contiguous() for name, t in snapshot.states.items()}
    tensors[TOKENS] = torch.tensor(snapshot.tokens, dtype=torch.int64)
    if snapshot.logits is not None:
        tensors[LOGITS] = snapshot.logits.cpu().contiguous()
    metadata = {"format": FORMAT, "fingerprint": session.fingerprint, "held": str(snapshot.held)}
    metadata["sha256"] = digest(tensors, metadata)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as e:
        raise JetExportError(f"{path}: the session cannot be written ({e}).") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def load_session(path: str | Path, engine: Engine, fingerprint: str) -> Session:
    """Read a session of `engine`, whose bundle has `fingerprint`. Raises JetExportError for any other file."""
    path = Path(path)
    metadata, tensors = _read(path)
    if metadata.get("format") != FORMAT:
        raise JetExportError(f"{path}: not a session file of this jet-export.", f"It reads {FORMAT!r}.")
    claimed = metadata.pop("sha256", "")
    if digest(tensors, metadata) != claimed:
        raise JetExportError(f"{path}: damaged (sha256 differs).", AGAIN)
    if metadata.get("fingerprint") != fingerprint:
        raise JetExportError(
            f"{path}: the session belongs to another bundle.", "Continue it with the bundle that made it."
        )
    tokens, held, logits = tensors.pop(TOKENS, None), metadata.get("held", ""), tensors.pop(LOGITS, None)
    if tokens is None or tokens.dtype != torch.int64 or tokens.dim() != 1 or not re.fullmatch("[0-9]{1,9}", held):
        raise JetExportError(f"{path}: no session: its tokens, or their number, are not there.", AGAIN)
    states = {name.removeprefix("state."): t.to(engine.device) for name, t in tensors.items()}
    logits = None if logits is None else logits.to(engine.device)
    snapshot = Snapshot(tuple(tokens.tolist()), int(held), states, logits)
    _check(path, snapshot, engine)
    return Session(snapshot, fingerprint)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as f:
            return dict(f.metadata() or {}), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise JetExportError(f"{path}: no such file.") from None
    except OSError as e:
        raise JetExportError(f"{path}: the session cannot be read ({e}).") from None
    except (SafetensorError, ValueError) as e:
        raise JetExportError(f"{path}: damaged or truncated ({e}).", AGAIN) from None


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """sha256 of the metadata and of every tensor's name, dtype, shape and bytes."""
    described = [[n, str(t.dtype), list(t.shape)] for n, t in sorted(tensors.items())]
    total = hashlib.sha256(json.dumps([sorted(metadata.items()), described]).encode())
    for _, t in sorted(tensors.items()):
        total.update(t.contiguous().view(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return total.hexdigest()


def _check(path: Path, snapshot: Snapshot, engine: Engine) -> None:
    """The file is intact; check that its states fit the engine before any kernel reads them."""
    config, limit = engine.config, engine.limits.max_seq_len
    if snapshot.held > limit:
        raise JetExportError(
            f"{path}: the session holds {snapshot.held} tokens; the bundle's max_seq_len is {limit}.",
            "Build the bundle with a larger --max-seq-len.",
        )
    shapes = {s.name: (state_shape(s, config, snapshot.held), s.dtype) for s in engine.specs if snapshot.held}
    found = {name: (tuple(t.shape), t.dtype) for name, t in snapshot.states.items()}
    logits = snapshot.logits
    whole = snapshot.held == len(snapshot.tokens)
    good = (
        found == shapes
        and 0 <= len(snapshot.tokens) - snapshot.held <= 1
        and all(0 <= t < config.vocab_size for t in snapshot.tokens)
        and (logits is not None) == (whole and snapshot.held > 0)
        and (logits is None or logits.shape == (config.vocab_size,))
    )
    if not good:
        raise JetExportError(f"{path}: its states are not those of this bundle's model.", AGAIN)


class Sessions:
    """The session methods that LLM and AsyncLLM share."""

    engine: Engine
    fingerprint: str

    def new_session(self) -> Session:
        """An empty session."""
        return Session(EMPTY, self.fingerprint)

    def fork(self, session: Session) -> Session:
        """Another session that continues from the same point, independently. Copies nothing."""
        session.check(self.fingerprint)
        return session.fork()

    def save_session(self, session: Session, path: str | Path) -> None:
        """Write a session to a safetensors file atomically. Raises JetExportError."""
        session.check(self.fingerprint)
        save_session(session, path)

    def load_session(self, path: str | Path) -> Session:
        """Read a session saved with this bundle. Raises JetExportError for any other or damaged file."""
        return load_session(path, self.engine, self.fingerprint)
