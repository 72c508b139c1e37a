"""Signatures of bundles: who vouches for the native code that a bundle holds.

`model.sig` is a Sigstore bundle over every other file, manifest.json included, made with an elliptic-curve key by
model-signing (OpenSSF), whose own command checks it too. No certificate, network or transparency log is involved.
Where a trusted key is configured (`--trusted-key`, JET_TRUSTED_KEY), a bundle without a signature by it is not loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jet_export.bundle.manifest import SIGNATURE, Manifest, check_files
from jet_export.utils.errors import JetExportError

VARIABLE = "JET_TRUSTED_KEY"
EXTRA = "pip install 'jet-export[sign]'"
CURVES = "an elliptic-curve key in PEM (P-256, P-384 or P-521): openssl ecparam -name prime256v1 -genkey -noout"


def trusted_key() -> Path | None:
    """The public key whose signature every bundle must have; None where none is configured."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else None


def trust(key: Path) -> None:
    """Load only bundles signed by this public key, in this process and in those that it starts."""
    _key_file(key, "--trusted-key")
    os.environ[VARIABLE] = str(key.resolve())


def sign_bundle(directory: Path, key: Path, password: str | None = None) -> Path:
    """Write the signature of a whole bundle. Raises JetExportError for a damaged bundle, or a key that cannot sign."""
    _key_file(key, "--key")
    check_files(directory, Manifest.load(directory))
    signing = _library("signing")
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key, password=password and password.encode())
    except (ValueError, TypeError) as e:
        raise JetExportError(f"--key {key}: cannot sign ({e}).", f"It takes {CURVES}.") from None
    path = directory / SIGNATURE
    tmp = directory.parent / f".{directory.resolve().name}.{SIGNATURE}.{os.getpid()}.tmp"
    try:
        signer.set_hashing_config(_hashing()).sign(directory, tmp)
        tmp.replace(path)
    except (OSError, ValueError) as e:
        raise JetExportError(f"{path}: cannot be written ({e}).", "Nothing has changed.") from None
    finally:
        tmp.unlink(missing_ok=True)
    return path


def check_signature(directory: str | Path) -> None:
    """Refuse a bundle without a signature by the trusted key, where one is configured."""
    key = trusted_key()
    if key is None:
        return
    directory, todo = (
        Path(directory),
        "Load a bundle that its holder has signed (jet-export sign), or trust another key.",
    )
    _key_file(key, VARIABLE)
    if not (directory / SIGNATURE).is_file():
        raise JetExportError(f"{directory}: not signed, and only bundles signed by {key} are loaded.", todo)
    verifying = _library("verifying")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except ValueError as e:
        raise JetExportError(
            f"{VARIABLE} {key}: no public key ({e}).", f"It takes {CURVES}; then openssl ec -pubout."
        ) from None
    try:
        config.set_hashing_config(_hashing()).verify(directory, directory / SIGNATURE)
    except Exception as e:  # whatever a foreign file makes of its readers: it is not this key's signature
        raise JetExportError(f"{directory}: not signed by {key} as it is now ({_sentence(e)}).", todo) from None


def _sentence(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0].strip().rstrip(".")[:200]


def _hashing() -> Any:
    """sha256 of every file but the signature; symbolic links are refused."""
    return _library("hashing").Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _library(name: str) -> Any:
    """A module of model-signing. Raises JetExportError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(f"model_signing.{name}")
    except ImportError as e:
        raise JetExportError(f"Signatures need model-signing, which does not import here: {e}.", EXTRA) from None


def _key_file(key: Path, option: str) -> None:
    if not key.is_file():
        raise JetExportError(f"{option} {key}: no such file.", f"It takes {CURVES}.")
