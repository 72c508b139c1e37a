"""Published checkpoints: loading and saving them.

`checkpoint_layout` (layout.py) is the one description of which tensor fills what; loading and saving both walk it, so
they are inverse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jet_export.model.config import JetNemotronConfig
from jet_export.model.fp8 import FP8
from jet_export.model.fp8_blocks import SUFFIX, block_size, is_blockwise, widen_blocks
from jet_export.model.fp8_checkpoint import (
    check_quant_algo,
    holds_kv_scales,
    kv_scale_names,
    place_fp8_linears,
    quantised_modules,
    scale_names,
    scale_value,
)
from jet_export.model.hf_files import copy_tokenizer, write_config
from jet_export.model.layout import Slice as Slice
from jet_export.model.layout import checkpoint_layout as checkpoint_layout
from jet_export.model.qwen3_5 import TEXT, text_name
from jet_export.model.unread import check_unread
from jet_export.utils.errors import JetExportError, shown
from jet_export.utils.schema import read_json

SHARD_BYTES = 4 * 2**30
AGAIN = "Download the file again."


class WeightedModel(nn.Module):
    """The part of JetNemotronForCausalLM that loading and saving a checkpoint need."""

    config: JetNemotronConfig
    embed_tokens: nn.Embedding
    layers: nn.ModuleList


@dataclass(frozen=True)
class CheckpointFiles:
    """A Hugging Face directory: config.json and the safetensors file that holds each tensor. Names are the text
    model's; `stored` says each one's in the file, which is another in a multimodal checkpoint (Qwen3.5)."""

    directory: Path
    config: JetNemotronConfig
    file_of: dict[str, Path]
    stored: dict[str, str]

    @classmethod
    def open(cls, directory: str | Path) -> CheckpointFiles:
        """Read config.json and the index. Raises JetExportError if the directory is not a checkpoint."""
        directory = Path(directory)
        config = JetNemotronConfig.from_json_file(directory / "config.json")
        index = directory / "model.safetensors.index.json"
        if index.exists():
            file_of = _indexed(index)
        else:
            files = sorted(directory.glob("*.safetensors"))
            if not files:
                raise JetExportError(f"{directory}: no *.safetensors file.", "Only safetensors checkpoints are read.")
            file_of = {name: file for file in files for name in _tensor_names(file)}
        for file in sorted(set(file_of.values())):
            _tensor_names(file)
        stored = {name if config.model_type != TEXT else text_name(name): name for name in file_of}
        return cls(directory, config, {name: file_of[own] for name, own in stored.items()}, stored)

    @property
    def nbytes(self) -> int:
        return sum(f.stat().st_size for f in set(self.file_of.values()))


def _indexed(index: Path) -> dict[str, Path]:
    """Tensor -> file, by an index. Raises JetExportError where it is none, or names a file elsewhere."""
    values = read_json(index, AGAIN)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise JetExportError(f"{index}: not a safetensors index.", AGAIN)
    for file in weight_map.values():
        if Path(file).name != file or not file.isprintable():
            raise JetExportError(f"{index}: {shown(file)} is no name of a file beside it.", AGAIN)
    return {name: index.parent / file for name, file in weight_map.items()}


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as f:
            return list(f.keys())
    except FileNotFoundError:
        raise JetExportError(f"{file}: no such file, though the index names it.", "Download it again.") from None
    except (SafetensorError, OSError) as e:
        raise JetExportError(f"{file}: damaged or truncated ({e}).", "Download the file again.") from None


def _tensors(files: CheckpointFiles, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, file by file, with one at a time in memory."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files.file_of[name], []).append(name)
    with ExitStack() as stack:
        for path, wanted in by_file.items():
            f = stack.enter_context(safe_open(path, "pt"))
            present = set(f.keys())
            for name in wanted:
                stored = files.stored[name]
                if stored not in present:
                    raise JetExportError(f"{path}: tensor {stored} is missing, though the index names it here.")
                yield name, f.get_tensor(stored)
            stack.pop_all().close()


def check_tensors(files: CheckpointFiles, *, mtp: bool = False) -> list[str]:
    """The modules that the checkpoint holds in FP8. `mtp`: its multi-token-prediction layer is read too (mtp.py).

    Raises JetExportError naming a tensor that is missing or one too many, or an unsupported format, before a model is
    allocated."""
    layout = checkpoint_layout(files.config)
    missing = [name for name in layout if name not in files.file_of]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise JetExportError(
            f"{files.directory}: tensor {missing[0]}{more} missing from the checkpoint.",
            "It does not match config.json (layer_types, tie_word_embeddings), or a shard was not downloaded.",
        )
    check_unread(files.config, layout, files.file_of, str(files.directory), mtp=mtp)
    check_quant_algo(files.directory, files.config)
    return quantised_modules({n: s.param for n, s in layout.items()}, files.file_of, str(files.directory))


@torch.no_grad()
def load_checkpoint(model: WeightedModel, files: CheckpointFiles, fp8: list[str]) -> None:
    """Fill a model of the checkpoint's config; the modules `fp8` become Fp8Linear.

    Raises JetExportError naming a tensor of the wrong shape or dtype, or with a NaN or an infinity.
    """
    layout = checkpoint_layout(files.config)
    place_fp8_linears(model, fp8)
    params: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fill(files, layout, params)
    _load_scales(model, files, layout, fp8)


@torch.no_grad()
def fill(files: CheckpointFiles, layout: dict[str, Slice], params: dict[str, Tensor]) -> None:
    """Fill parameters, by name, with the checkpoint's tensors of a layout; those in FP8 blocks are widened.

    Raises JetExportError as `load_checkpoint` does."""
    block = block_size(files.config, str(files.directory / "config.json"))
    scales = dict(_tensors(files, [n + SUFFIX for n in layout if block and n + SUFFIX in files.file_of]))
    for name, tensor in _tensors(files, list(layout)):
        into = layout[name]
        if block and is_blockwise(tensor, name, scales):
            tensor = widen_blocks(tensor, scales[name + SUFFIX], block, name, str(files.file_of[name]))
        param = params[into.param]
        _check_tensor(files.file_of[name], name, tensor, into.shape, param.dtype)
        if not all(map(is_finite, into.write(param, tensor))):
            raise JetExportError(
                f"{files.file_of[name]}: {name} has a NaN or an infinity.",
                "The checkpoint is damaged, or was saved by a training run that had diverged.",
            )


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass over it without a temporary of its size."""
    if x.dtype == FP8:  # NaN is 0x7f and 0xff; there is no infinity
        return not any(bool((rows.view(torch.uint8) & 0x7F == 0x7F).any()) for rows in torch.split(x, 1024))
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_tensor(file: Path, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise JetExportError(
            f"{file}: {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}.",
            "Use the config.json that belongs to these weights.",
        )
    if (tensor.dtype == FP8) != (dtype == FP8) or not tensor.is_floating_point():
        found = str(tensor.dtype).removeprefix("torch.")
        raise JetExportError(
            f"{file}: {name} is {found}, and its scales are {'there' if dtype == FP8 else 'not'}.",
            "Read here: bfloat16, float16 and float32, or float8_e4m3fn with weight_scale and input_scale.",
        )


def _load_scales(model: WeightedModel, files: CheckpointFiles, layout: dict[str, Slice], fp8: list[str]) -> None:
    """Fill the scales of FP8 projections, on which their published parts must agree, and of an FP8 KV cache."""
    filled: dict[tuple[str, str], tuple[str, float]] = {}
    targets = {
        scale: (s.param.removesuffix(".weight"), scale.rpartition(".")[2])
        for name, s in layout.items()
        if s.param.removesuffix(".weight") in fp8 and s.param.endswith(".weight")
        for scale in scale_names(name)
    }
    kv = kv_scale_names(files.config) if holds_kv_scales(files.file_of, files.config) else {}
    for name, tensor in _tensors(files, [*targets, *kv]):
        value = scale_value(tensor, name, files.file_of[name])
        if name in kv:
            i, attr = kv[name]
            setattr(model.layers[i].self_attn, attr, value)
            continue
        first, other = filled.setdefault(targets[name], (name, value))
        if other != value:
            raise JetExportError(
                f"{files.directory}: {first} is {other:g} and {name} is {value:g}.",
                "They are one FP8 product here and need one scale: `jet-export export-hf` writes such checkpoints.",
            )
        module, attr = targets[name]
        getattr(model.get_submodule(module), attr).fill_(value)


def published_tensors(model: WeightedModel) -> dict[str, Tensor]:
    """Every tensor under its published name: rows of the model's own, not copies, where a published tensor is that."""
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layout = checkpoint_layout(model.config)
    dtype = own["embed_tokens.weight"].dtype
    return {n: s.read(own[s.param].detach(), dtype) for n, s in layout.items()}


def save_checkpoint(model: WeightedModel, directory: Path, source: Path | None) -> None:
    """The published layout: fused parameters split again, shards of at most 4 GiB, config.json, and the tokenizer of
    the directory `source`, if it has one."""
    layout = checkpoint_layout(model.config)
    quantised = sorted({s.param for s in layout.values()} - dict(model.named_parameters()).keys())
    if quantised:
        raise JetExportError(
            f"save_pretrained: {quantised[0].removesuffix('.weight')} is FP8, which the published layout cannot hold.",
            "Save the model before quantising it, or write it with `jet-export export-hf`.",
        )
    directory.mkdir(parents=True, exist_ok=True)
    save_shards(published_tensors(model), directory)
    write_config(model.config.to_dict(), directory, model.embed_tokens.weight.dtype)
    if source is not None:
        copy_tokenizer(source, directory, beside=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """save_file, with the permissions of any new file: safetensors 0.8 leaves 0600, unreadable to other users."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def save_shards(tensors: dict[str, Tensor], directory: Path) -> None:
    """model.safetensors, or shards of at most 4 GiB and their index. From a CPU nothing is copied in memory."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    file_of = {}
    for i, names in enumerate(shards):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_tensors({n: tensors[n].cpu() for n in names}, directory / file, {"format": "pt"})
        file_of.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": file_of}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
