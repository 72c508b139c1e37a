"""The trainable model: the inference model's logits on packed rows, what trains, and the losses."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.compare import relative_error
from helpers.retrofits import ALONE, VOCAB, models, rows_of
from torch import Tensor

from jet_export.model.config import JetNemotronConfig
from jet_export.model.jet_nemotron import random_model
from jet_export.training import packed_attention
from jet_export.training.data.rows import Batch
from jet_export.training.model import TrainingModel, part_of
from jet_export.training.objective import FeatureObjective, LogitsObjective, backward
from jet_export.training.recipe import Recipe, StageRecipe
from jet_export.training.student import set_trainable

HYBRID = JetNemotronConfig(
    hidden_size=32, intermediate_size=48, layer_types=("jet", "attn", "swa", "jet"), num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, jet_num_heads=2, head_k_dim=16, expand_v=2.0, window_size=9, vocab_size=64,
    max_position_embeddings=256, rope_theta=1e4, bos_token_id=0, eos_token_id=0,
)  # fmt: skip

ROWS = rows_of([[40, 24], [64], [3, 61], [20, 20, 24]], VOCAB)


def weight(model: TrainingModel, name: str) -> Tensor:
    """Of the first layer's mixer."""
    return model.get_parameter(f"layers.0.self_attn.{name}.weight")


@pytest.mark.parametrize("qwen3", [False, True])
def test_packed_logits_are_the_inference_models_one_by_one(qwen3: bool) -> None:
    config = replace(HYBRID, qk_norm=True, qkv_bias=False, tie_word_embeddings=False) if qwen3 else HYBRID
    model = random_model(config, torch.float32, seed=3)
    for name, p in model.named_parameters():  # norms and biases that are no ones and zeros
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.1)
    rows = rows_of([[30, 50], [1, 70, 9]], config.vocab_size)
    batch = Batch.of(rows)
    with torch.no_grad():
        packed = TrainingModel(model, torch.float32)(batch, TrainingModel.logits)
        lengths = [n for row in rows for n in row.lengths]
        alone = torch.cat([model(s[None])[0] for s in batch.tokens.split(lengths)])
    assert relative_error(packed, alone) < 2e-5


def test_a_student_is_its_teacher_where_nothing_is_replaced(recipe: Recipe) -> None:
    same = replace(recipe, student=replace(recipe.student, layers="aaa"))
    student, teacher = models(same)
    batch = Batch.of(rows_of([[40, 24]], VOCAB))
    with torch.no_grad():
        assert torch.equal(student(batch, TrainingModel.logits), teacher(batch, TrainingModel.logits))


def test_the_student_has_the_teachers_weights_and_new_jet_blocks(recipe: Recipe) -> None:
    student, teacher = models(recipe)
    again, _ = models(recipe)
    theirs = dict(teacher.named_parameters())
    for (name, p), (_, q) in zip(student.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
        if part_of(name, student.config.layer_types) != "jet":
            assert torch.equal(p, theirs[name]), name
    other, _ = models(replace(recipe, seed=1))
    assert not torch.equal(weight(other, "in_proj"), weight(student, "in_proj"))


@pytest.mark.parametrize("parts", [("jet",), ("attention", "norms"), ("mlp",), ("embeddings",)])
def test_gradients_reach_the_parts_that_train_and_no_others(recipe: Recipe, parts: tuple[str, ...]) -> None:
    student, teacher = models(recipe)
    trained = set_trainable(student, parts)
    objective = LogitsObjective(student, teacher, StageRecipe(ce_weight=1.0))
    backward(objective, rows_of([[40, 24], [64]], VOCAB), 1, ALONE)
    for name, p in student.named_parameters():
        if name in trained:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None, name
    assert {part_of(n, student.config.layer_types) for n in trained} == set(parts)
    assert all(p.grad is None for p in teacher.parameters())


def gradients(recipe: Recipe, features: bool, micro_batch: int, checkpointing: bool = False) -> dict[str, Tensor]:
    student, teacher = models(recipe)
    set_trainable(student, ("jet",))
    for layer in student.training_layers:
        layer.activation_checkpointing = checkpointing
    stage = StageRecipe(ce_weight=0.5)
    objective = FeatureObjective(student, teacher) if features else LogitsObjective(student, teacher, stage)
    loss = backward(objective, ROWS, micro_batch, ALONE).means(ALONE)
    out = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return {**out, "loss": torch.tensor(loss.loss), **{k: torch.tensor(v) for k, v in loss.parts.items()}}


@pytest.mark.parametrize("features", [True, False])
def test_micro_batches_and_checkpointing_leave_the_gradients(recipe: Recipe, features: bool) -> None:
    whole = gradients(recipe, features, 4)
    assert len(whole) > 8
    for other in (gradients(recipe, features, 1), gradients(recipe, features, 4, checkpointing=True)):
        for name, value in whole.items():
            assert relative_error(other[name], value) < 2e-5, name


def test_features_are_matched_layer_by_layer_on_the_teachers_inputs(recipe: Recipe) -> None:
    student, teacher = models(replace(recipe, student=replace(recipe.student, layers="jaj")))
    set_trainable(student, ("jet",))
    rows = rows_of([[40, 24]], VOCAB)
    loss = backward(FeatureObjective(student, teacher), rows, 1, ALONE).means(ALONE)
    batch = Batch.of(rows)
    with torch.no_grad():
        h = teacher.embed(batch)
        for i, layer in enumerate(teacher.training_layers):
            out = layer(h, teacher.context(batch))
            if i != 1:
                y = student.training_layers[i](h, student.context(batch)).mixed
                wanted = ((y - out.mixed).square().sum() / out.mixed.square().sum()).item()
                assert loss.parts[f"layer_{i}"] == pytest.approx(wanted, rel=1e-5)
            h = out.hidden
    assert loss.loss == pytest.approx(sum(loss.parts.values()) / 2)


def test_a_student_that_is_its_teacher_has_no_divergence(recipe: Recipe) -> None:
    _, teacher = models(recipe)
    stage = StageRecipe(ce_weight=1.0)
    loss = backward(
        LogitsObjective(copy.deepcopy(teacher).requires_grad_(), teacher, stage), rows_of([[64]], VOCAB), 1, ALONE
    ).means(ALONE)
    assert abs(loss.parts["kl"]) < 1e-5
    assert loss.loss == pytest.approx(loss.parts["kl"] + loss.parts["ce"])


@pytest.mark.parametrize("how", ["repeat", "svd"])
@pytest.mark.parametrize(("K", "V"), [(16, 32), (16, 16), (32, 48)])
def test_a_warm_start_keeps_the_heads_products(recipe: Recipe, how: str, K: int, V: int) -> None:
    """Of K and V of at least Dh = 16: Wq^T Wk, up to how often a row is repeated, and Wo Wv."""
    sizes = replace(recipe.student, layers="jaa", num_heads=4, head_k_dim=K, head_v_dim=V, init=how)
    student, teacher = models(replace(recipe, student=sizes))
    cold, _ = models(replace(recipe, student=replace(sizes, init="random")))
    q, k, v = torch.split(weight(teacher, "qkv_proj"), [64, 32, 32])
    own_q, own_k, own_v = torch.split(weight(student, "in_proj")[: 8 * K + 4 * V], [4 * K, 4 * K, 4 * V])
    start_q, start_k, start_v = torch.split(weight(cold, "in_proj")[: 8 * K + 4 * V], [4 * K, 4 * K, 4 * V])
    own_o, start_o, o = (weight(m, "o_proj") for m in (student, cold, teacher))
    for h in range(4):
        at, kv = slice(h * 16, h * 16 + 16), slice(h // 2 * 16, h // 2 * 16 + 16)
        ours, theirs = slice(h * K, h * K + K), slice(h * V, h * V + V)
        # svd leaves the rows beyond Dh as they were drawn
        rest_k = start_q[ours][16:].mT @ start_k[ours][16:] if how == "svd" else 0.0
        rest_v = start_o[:, theirs][:, 16:] @ start_v[theirs][16:] if how == "svd" else 0.0
        times = K // 16 if how == "repeat" else 1
        assert relative_error(own_q[ours].mT @ own_k[ours] - rest_k, times * (q[at].mT @ k[kv])) < 1e-4
        product = o[:, at] @ v[kv]
        assert relative_error(own_o[:, theirs] @ own_v[theirs] - rest_v, product) < 1e-4


def test_a_warm_start_of_a_smaller_rank_is_the_nearest() -> None:
    from jet_export.training.warm_start import low_rank

    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 40, generator=rng) for _ in range(2))
    small, other = low_rank(a, b, 5)
    s = torch.linalg.svdvals(a.mT @ b)
    left = torch.linalg.matrix_norm(a.mT @ b - small.mT @ other)
    assert small.shape == (5, 40) and left == pytest.approx(s[5:8].square().sum().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("window", [0, 9, 129, 300])
@pytest.mark.parametrize("length", [100, 128, 640, 700])
def test_the_block_mask_is_flex_attentions_own(length: int, window: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = [[length], [length - 60, 40, 20], [5, length - 5], [length // 2, length - length // 2]]
    segments = Batch.of(rows_of(lengths, 64)).segments.view(4, -1)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = (segments[b, i] == segments[b, j]) & (j <= i)
        return same & (j > i - window) if window else same

    ours = packed_attention.block_mask(segments, window, seen)
    theirs = create_block_mask(seen, 4, None, length, length, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for part in ("kv", "q"):
        for full in ("", "full_"):
            for name in (f"{full}{part}_num_blocks", f"{full}{part}_indices"):
                x, y = getattr(ours, name), getattr(theirs, name)
                assert torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype, name


@pytest.mark.parametrize("window", [0, 9])
def test_flex_attention_sees_what_the_mask_lets_through(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """What a GPU runs compiled, here in plain PyTorch."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(packed_attention, "_compiled_flex", lambda: flex_attention)
    segments = Batch.of(rows_of([[100, 28], [1, 60, 67]], 64)).segments.view(2, -1)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 128, 16, generator=rng) for heads in (4, 2, 2))
    flex, masked = packed_attention._flex(segments, window), packed_attention._masked(segments, window)
    assert relative_error(flex(q, k, v), masked(q, k, v)) < 1e-5


def test_bf16_activations_train_fp32_weights(recipe: Recipe) -> None:
    """Losses and gradients are near those of fp32; frozen weights are bf16, the teacher's own memory."""
    exact = gradients(recipe, False, 4)
    student, teacher = models(recipe, torch.bfloat16)
    set_trainable(student, ("jet",))
    loss = backward(LogitsObjective(student, teacher, StageRecipe(ce_weight=0.5)), ROWS, 4, ALONE).means(ALONE)
    assert loss.loss == pytest.approx(exact["loss"].item(), rel=1e-3)
    for name, p in student.named_parameters():
        if p.grad is not None:
            assert p.dtype == p.grad.dtype == torch.float32
            assert relative_error(p.grad, exact[name]) < 0.1, name
    frozen = replace(recipe, stage=recipe.stage[:1])
    student, teacher = models(frozen, torch.bfloat16)
    ours, theirs = (m.get_parameter("layers.1.mlp.down_proj.weight") for m in (student, teacher))
    assert ours.dtype == torch.bfloat16 and ours.data_ptr() == theirs.data_ptr()
