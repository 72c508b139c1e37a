"""Resolves `--model`: a preset, a directory or a Hugging Face hub id."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jet_export.model.config import JetNemotronConfig
from jet_export.model.presets import (
    jet_2b,
    jet_4b,
    qwen3_1_7b,
    qwen3_5_0_8b,
    qwen3_5_2b,
    qwen3_5_4b,
    qwen3_5_9b,
    qwen3_5_27b,
)
from jet_export.utils.errors import JetExportError

JET_TINY_DIR = Path(str(files("jet_export"))) / "data" / "jet-tiny"
HUB_ID = {
    "jet-2b": "jet-ai/Jet-Nemotron-2B",
    "jet-4b": "jet-ai/Jet-Nemotron-4B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
    **{f"qwen3.5-{size.lower()}": f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B", "27B")},
}
PRESETS: dict[str, Callable[[], JetNemotronConfig]] = {
    "jet-tiny": lambda: JetNemotronConfig.from_json_file(JET_TINY_DIR / "config.json"),
    "jet-2b": jet_2b,
    "jet-4b": jet_4b,
    "qwen3-1.7b": qwen3_1_7b,  # the baseline
    "qwen3.5-0.8b": qwen3_5_0_8b,
    "qwen3.5-2b": qwen3_5_2b,
    "qwen3.5-4b": qwen3_5_4b,
    "qwen3.5-9b": qwen3_5_9b,
    "qwen3.5-27b": qwen3_5_27b,
}
CARD = "README.md"
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))


def local_directory(name: str) -> Path | None:
    """The directory that `name` names without a download: jet-tiny's, or an existing path."""
    if name == "jet-tiny":
        return JET_TINY_DIR
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def load_config(name: str) -> JetNemotronConfig:
    """The architecture alone: a preset, a directory with config.json, or a config.json file. Downloads nothing."""
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name).expanduser()
    if path.is_dir():
        return JetNemotronConfig.from_json_file(path / "config.json")
    if path.suffix == ".json" and path.exists():
        return JetNemotronConfig.from_json_file(path)
    for preset, hub_id in HUB_ID.items():
        if name == hub_id:
            return PRESETS[preset]()
    raise unknown_model(name)


def licence_files(directory: Path) -> list[Path]:
    """Files to copy with the weights: LICENSE and NOTICE, or the model card if only that names a licence."""
    texts = _licence_texts(directory)
    return texts if texts or _card_licence(directory) is None else [directory / CARD]


def checkpoint_licence(directory: Path) -> str | None:
    """The checkpoint's licence: the first line of its LICENSE, or `license:` at the head of its model card."""
    for path in _licence_texts(directory):
        return path.read_text(errors="replace").strip().partition("\n")[0].strip()
    return _card_licence(directory)


def _licence_texts(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_file() and p.name.upper().startswith(("LICENSE", "NOTICE")))


def _card_licence(directory: Path) -> str | None:
    card = directory / CARD
    if not card.is_file():
        return None
    head = card.read_text(errors="replace").split("---")
    fields = head[1].splitlines() if len(head) > 2 and not head[0].strip() else []
    return next((f.partition(":")[2].strip() for f in fields if f.startswith("license:")), None)


def hub_id_of(name: str) -> str | None:
    """The hub repository that a preset or OWNER/NAME stands for."""
    hub_id = HUB_ID.get(name, name)
    return hub_id if is_hub_id(hub_id) else None


def resolve_checkpoint(name: str, code: bool = False, bars: type[Any] | None = None) -> Path:
    """The directory with the weights of `name`, downloaded from the hub if it is not local. `code`: its Python files
    too. `bars`: the tqdm class that is told how much has come; None: the hub's.

    Raises JetExportError for an unknown name, or if the hub cannot be reached.
    """
    import huggingface_hub

    found = local_directory(name)
    if found is not None:
        return found
    patterns = [*CHECKPOINT_FILES, *(["*.py"] if code else [])]
    return _from_hub(name, lambda i: huggingface_hub.snapshot_download(i, allow_patterns=patterns, tqdm_class=bars))


def hub_config(name: str) -> JetNemotronConfig:
    """The architecture of a hub id; downloads only its config.json. Raises as `resolve_checkpoint`."""
    import huggingface_hub

    path = _from_hub(name, lambda i: huggingface_hub.hf_hub_download(i, "config.json"))
    return JetNemotronConfig.from_json_file(path)


def _from_hub(name: str, fetch: Callable[[str], str]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    hub_id = hub_id_of(name)
    if hub_id is None:
        raise unknown_model(name)
    try:
        return Path(fetch(hub_id))
    except RepositoryNotFoundError:
        raise JetExportError(f"--model {name}: the hub has no repository {hub_id}, or it needs a login.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise JetExportError(
            f"--model {name}: {hub_id} could not be downloaded ({type(e).__name__}).",
            "Without network access, copy the checkpoint here and pass --checkpoint DIR, or use --random-weights.",
        ) from None


def unknown_model(name: str) -> JetExportError:
    return JetExportError(
        f"--model {name}: no such preset, directory or hub id.",
        f"Presets: {', '.join(PRESETS)}. Or a directory with config.json and *.safetensors, or OWNER/NAME on the hub.",
    )
