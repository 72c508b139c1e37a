"""The student: the teacher's config with other mixers, and its weights: the teacher's, with new JetBlocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from jet_export.model.config import JetNemotronConfig
from jet_export.model.config_schema import NO_TOKEN
from jet_export.model.hub import PRESETS, load_config, resolve_checkpoint
from jet_export.model.jet_dims import JetDims, expand_v_of
from jet_export.model.jet_nemotron import JetBlock, JetNemotronForCausalLM, empty_model, random_model
from jet_export.model.qwen3_5 import not_yet
from jet_export.model.weights import CheckpointFiles, check_tensors, load_checkpoint
from jet_export.training.model import TrainingModel, part_of
from jet_export.training.recipe import Recipe, StudentRecipe
from jet_export.training.warm_start import warm_start
from jet_export.utils.errors import JetExportError

LETTERS = {"j": "jet", "a": "attn", "s": "swa"}
TEACHERS = ("qwen2", "qwen3")
SAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "qk_norm", "qkv_bias",
)  # fmt: skip


def open_teacher(name: str) -> CheckpointFiles:
    """Raises JetExportError where it is no unquantised Qwen2 or Qwen3 checkpoint of attention layers alone."""
    try:
        files = CheckpointFiles.open(resolve_checkpoint(name))
    except JetExportError as e:
        raise JetExportError(str(e).replace("--model ", "--teacher ", 1)) from None
    c = files.config
    if c.model_type not in TEACHERS or set(c.layer_types) != {"attn"}:
        raise JetExportError(
            f"--teacher {name}: model_type is {c.model_type!r}.",
            f"A teacher has full attention in every layer: {', '.join(TEACHERS)} (Qwen2, Qwen2.5, Qwen3).",
        )
    if check_tensors(files):
        raise JetExportError(f"--teacher {name}: its weights are FP8.", "Take the checkpoint in bfloat16.")
    return files


def student_config(teacher: JetNemotronConfig, student: StudentRecipe) -> JetNemotronConfig:
    """Raises JetExportError where the layers do not fit the teacher's."""
    layers = student.layers
    if layers in PRESETS or layers.endswith(".json") or Path(layers).is_dir():
        config = load_config(layers)
        not_yet(config, f"student.layers {layers}", "A student's new layers are JetBlocks: letters, jet-2b, jet-4b.")
        return _fitting(config, teacher, layers)
    if set(layers) - set(LETTERS):
        raise JetExportError(
            f"student.layers is {layers!r}.",
            "It takes a letter a layer (j: JetBlock, a: attention, s: sliding window), a preset or a config.json.",
        )
    n = teacher.num_hidden_layers
    if len(layers) != n:
        raise JetExportError(f"student.layers has {len(layers)} letters, the teacher {n} layers.", "A letter a layer.")
    if "s" in layers and not student.window_size:
        raise JetExportError("student.layers has sliding windows, and student.window_size is not set.", "Set it.")
    H, K = student.num_heads or teacher.num_attention_heads, student.head_k_dim or teacher.head_dim
    dims = JetDims(H, K, student.head_v_dim or 2 * teacher.head_dim)
    return replace(
        teacher,
        model_type="jet_nemotron",
        layer_types=tuple(LETTERS[letter] for letter in layers),
        jet_num_heads=H,
        head_k_dim=K,
        expand_v=expand_v_of(dims),
        conv_size=student.conv_size,
        window_size=student.window_size if "s" in layers else 0,
        raw={},
    )


def _fitting(config: JetNemotronConfig, teacher: JetNemotronConfig, where: str) -> JetNemotronConfig:
    for name in SAME:
        ours, theirs = getattr(config, name), getattr(teacher, name)
        if ours != theirs:
            raise JetExportError(
                f"student.layers {where}: {name} is {ours}, the teacher has {theirs}.",
                "jet-2b has the sizes of Qwen2.5-1.5B, jet-4b those of Qwen2.5-3B.",
            )
    tokens = {name: getattr(teacher, name) for name in ("bos_token_id", "eos_token_id")}
    return replace(config, max_position_embeddings=teacher.max_position_embeddings, **tokens)


def load_teacher(files: CheckpointFiles, dtype: torch.dtype, device: torch.device) -> TrainingModel:
    """Frozen, in `dtype`."""
    model = empty_model(files.config, dtype, device, max_positions=1)
    load_checkpoint(model, files, [])
    return TrainingModel(model, dtype).requires_grad_(False).eval()


@torch.no_grad()
def new_student(teacher: TrainingModel, config: JetNemotronConfig, recipe: Recipe) -> TrainingModel:
    """The teacher's weights, and JetBlocks initialised from the seed and the layer alone. Parts that some stage trains
    are fp32; others keep the teacher's dtype, and share its memory."""
    device = teacher.embed_tokens.weight.device
    model = empty_model(config, teacher.dtype, device, max_positions=1)
    own: dict[str, Tensor] = dict(model.named_parameters())
    for name, p in own.items():
        if part_of(name, config.layer_types) in recipe.trained:
            p.data = p.data.float()
    theirs = dict(teacher.named_parameters())
    for name, p in own.items():
        if part_of(name, config.layer_types) == "jet":
            continue
        if p.dtype == theirs[name].dtype:
            p.data = theirs[name].data
        else:
            p.copy_(theirs[name])
    for i, layer in enumerate(model.layers):
        if isinstance(layer.self_attn, JetBlock):
            init_jet_block(layer.self_attn, config, seed=recipe.seed * 100_003 + i)
            warm_start(layer.self_attn, teacher.get_submodule(f"layers.{i}.self_attn"), recipe.student.init)
    return TrainingModel(model, teacher.dtype)


@torch.no_grad()
def init_jet_block(block: JetBlock, config: JetNemotronConfig, seed: int) -> None:
    """The published initialisation, drawn on the CPU: the same on every device."""
    sizes = {0: JetDims(block.num_heads, block.head_k_dim, block.head_v_dim)}
    alone = replace(
        config, layer_types=("jet",), jet_layers=(), window_size=0, vocab_size=1, intermediate_size=1,
        bos_token_id=NO_TOKEN, eos_token_id=NO_TOKEN,
    )  # fmt: skip
    drawn = random_model(alone.with_jet_dims(sizes), torch.float32, seed=seed, max_positions=1)
    block.load_state_dict(drawn.get_submodule("layers.0.self_attn").state_dict())


def set_trainable(model: TrainingModel, parts: tuple[str, ...]) -> list[str]:
    """Of the named parameters, those of `parts` train. Returns their names."""
    kinds = model.config.layer_types
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name, kinds) in parts)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise JetExportError(f"train = {list(parts)}: the student has no such parameter.", "Train another part.")
    return trained


def inference_model(
    config: JetNemotronConfig, tensors: dict[str, Tensor], dtype: torch.dtype
) -> JetNemotronForCausalLM:
    """The model to save, on the CPU, of parameters by name (a whole state dict)."""
    model = empty_model(config, dtype, torch.device("cpu"), max_positions=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[name])
    return model
