"""Sampling: the kernels against the float64 specification, exact supports, distributions, independence of the batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from jet_export.kernels import sampling as sampling_kernels
from jet_export.kernels.sampling_ref import RowSettings, gumbel_ref, philox_ref, sample_ref, support_ref
from jet_export.runtime.sampler import SlotSampler

V = 300
MIX = [
    RowSettings(),
    RowSettings(temperature=1.0, seed=3),
    RowSettings(temperature=0.8, top_p=0.9, seed=2**63 + 5),
    RowSettings(temperature=0.8, top_k=5, seed=9),
    RowSettings(temperature=2.0, top_k=40, top_p=0.7, min_p=0.01, seed=11),
    RowSettings(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, seed=-4),
    RowSettings(temperature=1.0, logit_bias=((3, 5.0), (7, -100.0)), seed=1),
    RowSettings(min_tokens=2, blocked=(1, 2, 250)),
    RowSettings(temperature=1.5, min_p=0.2, choice=3),
    RowSettings(temperature=1.0, top_p=0.01),
    RowSettings(temperature=1.0, top_k=10, top_p=0.5, seed=21),
    RowSettings(temperature=1.0, top_k=12, min_p=0.3, seed=22),
]


def sampler(device, rows, prompts, vocab=V) -> SlotSampler:
    """Row i in slot 3 i + 1, by the kernels."""
    out = SlotSampler(3 * len(rows) + 1, vocab, torch.device(device), kernels=True)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        out.begin(3 * i + 1, row, prompt, [])
    return out


def slots_of(order, device) -> torch.Tensor:
    return torch.tensor([3 * i + 1 for i in order], dtype=torch.int32, device=device)


def draw(sampling: SlotSampler, logits: torch.Tensor, order) -> list[int]:
    return sampling.sample(logits, slots_of(order, logits.device))[0].tolist()


def many(row: RowSettings, logits: torch.Tensor, n: int, seed: int = 0) -> list[int]:
    """The first tokens of n requests that differ in their seeds; on a CPU by the specification, which is quicker."""
    sampling = SlotSampler(3 * n + 1, len(logits), logits.device)
    for i in range(n):
        sampling.begin(3 * i + 1, RowSettings(**{**row.__dict__, "seed": seed + i}), [], [])
    return draw(sampling, logits.expand(n, -1).contiguous(), range(n))


def test_philox_is_the_published_one() -> None:
    """Known answers of Random123 (Philox-4x32-10): zero, and all ones in the low key and the words used here."""
    assert [hex(x) for x in philox_ref(0, 0, 0, 4)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert len(set(philox_ref(5, 1, 0, 4096).tolist())) > 4090


def test_words_do_not_repeat_over_position_choice_and_seed() -> None:
    words = [philox_ref(*key, 64).tolist() for key in ((1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (1 + 2**32, 0, 0))]
    assert len({tuple(w) for w in words}) == 5


@pytest.mark.parametrize("listed", [1, 8])
def test_top_k_searches_the_row_where_its_list_overflows(device, monkeypatch, listed) -> None:
    monkeypatch.setattr(sampling_kernels, "LISTED", listed)
    rows = [
        RowSettings(temperature=1.0, seed=i, top_k=k, top_p=p)
        for i, (k, p) in enumerate([(5, 1.0), (7, 0.6), (2, 0.9)])
    ]
    logits = torch.randn(3, V).round()
    tokens = draw(sampler(device, rows, [[]] * 3), logits.to(device), range(3))
    assert tokens == [sample_ref(x.double().numpy(), row, [], []) for x, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("ties", [False, True])
def test_the_kernels_are_the_specification_for_any_mix_of_rows(device, ties) -> None:
    rng = torch.Generator().manual_seed(int(ties))
    prompts = torch.randint(V, (len(MIX), 20), generator=rng).tolist()
    sampling = sampler(device, MIX, prompts)
    made: list[list[int]] = [[] for _ in MIX]
    for _ in range(3):
        logits = torch.randn(len(MIX), V, generator=rng) * 3
        logits = (logits * 2).round() / 2 if ties else logits
        order = torch.randperm(len(MIX), generator=rng).tolist()
        tokens, lse = sampling.sample(logits[order].to(device), slots_of(order, device))
        for token, i in zip(tokens.tolist(), order, strict=True):
            assert token == sample_ref(logits[i].double().numpy(), MIX[i], prompts[i], made[i]), MIX[i]
            made[i].append(token)
        assert torch.allclose(lse.cpu(), logits[order].logsumexp(-1), atol=1e-5)


def test_the_host_draws_what_the_kernels_draw(device) -> None:
    logits = torch.randn(len(MIX), V)
    host = SlotSampler(3 * len(MIX) + 1, V, torch.device("cpu"), kernels=False)
    for i, row in enumerate(MIX):
        host.begin(3 * i + 1, row, [1, 2], [])
    order = range(len(MIX))
    assert draw(host, logits, order) == draw(sampler(device, MIX, [[1, 2]] * len(MIX)), logits.to(device), order)


def test_a_row_is_drawn_alone_as_among_others(device) -> None:
    logits = torch.randn(len(MIX), V, device=device)
    together = draw(sampler(device, MIX, [[]] * len(MIX)), logits, range(len(MIX)))
    sampling = sampler(device, MIX, [[]] * len(MIX))
    alone = [draw(sampling, logits[i : i + 1], [i])[0] for i in reversed(range(len(MIX)))]
    assert alone[::-1] == together


def test_a_request_that_goes_on_elsewhere_draws_the_same(device) -> None:
    """Its position and counts are all there is to carry over."""
    row, prompt = MIX[5], [4, 8, 4]
    logits = torch.randn(4, V, device=device)
    stayed, made = sampler(device, [row], [prompt]), []
    for x in logits:
        made += draw(stayed, x[None], [0])
    moved = SlotSampler(2, V, torch.device(device), kernels=True)
    moved.begin(1, row, prompt, made[:2])
    slots = torch.tensor([1], dtype=torch.int32, device=device)
    assert [int(moved.sample(x[None], slots)[0]) for x in logits[2:]] == made[2:]


# Of probabilities 0.4, 0.2, 0.2, 0.12, 0.08.
SUPPORTS: list[tuple[dict[str, Any], Any]] = [
    (dict(top_k=2), {0, 1, 2}),  # 1 and 2 tie for the second place
    (dict(top_k=1), {0}),
    (dict(top_p=0.39), {0}),
    (dict(top_p=0.41), {0, 1, 2}),  # crossed by 1, and 2 ties with it
    (dict(top_p=0.81), {0, 1, 2, 3}),
    (dict(min_p=0.49), {0, 1, 2}),
    (dict(min_p=0.51), {0}),
    (dict(top_k=3, top_p=0.51), {0, 1, 2}),  # half of the mass within the top 3 is 0's
    (dict(top_k=3, top_p=0.49), {0}),
]


@pytest.mark.parametrize(("row", "support"), SUPPORTS)
def test_supports_are_exact(device, row, support) -> None:
    """All of the support is drawn, and nothing else."""
    logits = torch.tensor([0.4, 0.2, 0.2, 0.12, 0.08]).log()
    settings = RowSettings(temperature=1.0, **row)
    assert set(np.flatnonzero(support_ref(logits.double().numpy(), settings))) == support
    assert set(many(settings, logits.to(device), 100)) == support


def test_the_kernels_supports_are_the_specifications(device) -> None:
    logits = torch.tensor([0.4, 0.2, 0.2, 0.12, 0.08]).log().expand(len(SUPPORTS), -1).contiguous()
    rows = [RowSettings(temperature=1.0, seed=i, **row) for i, (row, _) in enumerate(SUPPORTS)]
    tokens = draw(sampler(device, rows, [[]] * len(rows), 5), logits.to(device), range(len(rows)))
    assert tokens == [sample_ref(x.double().numpy(), row, [], []) for x, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("row", [dict(), dict(top_k=4), dict(top_p=0.8), dict(temperature=0.5), dict(min_p=0.3)])
def test_frequencies_follow_the_probabilities(device, row) -> None:
    """Chi-square over 400 requests with fixed seeds, against the 0.999 quantile of 9 degrees of freedom."""
    logits = torch.linspace(0, 2, 10)
    settings = RowSettings(**{"temperature": 1.0, **row})
    y = logits.double().numpy() / settings.temperature
    p = np.where(support_ref(y, settings), np.exp(y), 0)
    p /= p.sum()
    n = 400
    seen = np.bincount(many(settings, logits.to(device), n, seed=1000), minlength=10)
    assert (seen[p == 0] == 0).all()
    assert ((seen - n * p) ** 2 / (n * p).clip(1e-9))[p > 0].sum() < 27.9


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    g = np.concatenate([gumbel_ref(7, i, 0, 65536) for i in range(4)])
    assert abs(g.mean() - np.euler_gamma) < 0.01 and abs(g.var() - np.pi**2 / 6) < 0.02


def test_a_row_without_a_distribution_gives_no_token_and_disturbs_no_other(device) -> None:
    logits = torch.randn(6, V, device=device)
    good = draw(sampler(device, MIX[:6], [[]] * 6), logits, range(6))
    logits[0, 7] = logits[1, 0] = logits[2, V - 1] = logits[3, 5] = torch.nan
    logits[4] = -torch.inf
    assert draw(sampler(device, MIX[:6], [[]] * 6), logits, range(6)) == [-1] * 5 + good[5:]


def test_token_masks(device) -> None:
    rows = [RowSettings(), RowSettings(temperature=1.0, top_p=0.9), RowSettings(temperature=1.0)]
    sampling = SlotSampler(3, V, torch.device(device), kernels=True)
    for i, row in enumerate(rows):
        sampling.begin(i, row, [], [], masked=i < 2)
    logits = torch.randn(3, V, device=device)
    allowed = np.zeros((3, V), dtype=bool)
    allowed[0, [31, 32, 299]] = allowed[1, [0, 63]] = True
    words = np.packbits(np.pad(allowed, ((0, 0), (0, -V % 32))), axis=1, bitorder="little").view(np.int32)
    slots = torch.arange(3, dtype=torch.int32, device=device)
    tokens = sampling.sample(logits, slots, torch.from_numpy(words.copy()).to(device))[0].tolist()
    for i in range(3):
        mask = allowed[i] if i < 2 else None  # the third row has none
        assert tokens[i] == sample_ref(logits[i].double().cpu().numpy(), rows[i], [], [], mask)
    none = torch.zeros(3, words.shape[1], dtype=torch.int32, device=device)
    assert sampling.sample(logits, slots, none)[0].tolist()[:2] == [-1, -1]


@pytest.mark.gpu
@pytest.mark.parametrize("row", [dict(), dict(top_k=50), dict(top_p=0.9), dict(top_k=1000, top_p=0.95, min_p=1e-4)])
def test_the_published_vocabulary_on_a_gpu(row) -> None:
    """Chi-square of 20 bins of equal probability over 4,096 requests: 43.8 is the 0.999 quantile of 19 degrees."""
    vocab, n = 151_936, 4096
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).bfloat16() * 2
    settings = RowSettings(temperature=1.0, **row)
    y = logits.double().numpy()
    p = np.where(support_ref(y, settings), np.exp(y - y.max()), 0.0)
    p /= p.sum()
    bins = np.minimum((p.cumsum() * 20).astype(int), 19)
    expected = n * np.bincount(bins, weights=p, minlength=20)
    tokens: list[int] = []
    for seed in range(0, n, 512):
        tokens += many(settings, logits.cuda(), 512, seed)
    assert (p[tokens] > 0).all()
    seen = np.bincount(bins[tokens], minlength=20)
    assert ((seen - expected) ** 2 / expected).sum() < 43.8


@pytest.mark.gpu
def test_nothing_synchronises_and_a_nan_leaves_the_gpu_usable() -> None:
    sampling = sampler("cuda", MIX, [[]] * len(MIX))
    logits = torch.randn(len(MIX), V, device="cuda")
    logits[1, 0] = torch.nan
    slots = slots_of(range(len(MIX)), "cuda")
    sampling.sample(logits, slots)  # compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens, _ = sampling.sample(logits, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist()[1] == -1 and min(tokens.tolist()[2:]) >= 0


@pytest.mark.parametrize("kernels", [True, False])
def test_looking_ahead_draws_what_the_later_steps_draw(device, kernels: bool) -> None:
    """Rows of three positions of each slot in one call, against three calls; then the slots go on from the second. Of
    slots with penalties each position counts the drafted tokens before it, and all have a mask of their own."""
    rows = [*MIX, RowSettings(repetition_penalty=3.0, presence_penalty=1.0, frequency_penalty=2.0)]
    assert sum(row.penalised for row in rows) > 1
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, len(rows), V, generator=generator) * 3
    logits[1:] += logits[0]  # the same tokens are likely again, but for penalties
    logits = logits.to(device)
    allowed = (
        torch.randint(-(2**31), 2**31, (3, len(rows), -(-V // 32)), generator=generator).to(torch.int32).to(device)
    )

    def begun() -> SlotSampler:
        out = SlotSampler(len(rows), V, torch.device(device), kernels=kernels)
        for i, row in enumerate(rows):
            out.begin(i, row, [1, 2, 3], [4], masked=True)
        return out

    slots = torch.arange(len(rows), dtype=torch.int32, device=device)
    three = [i for i in range(len(rows)) for _ in range(3)]
    one_by_one, ahead = begun(), begun()
    expected = [one_by_one.sample(x, slots, mask) for x, mask in zip(logits, allowed, strict=True)]
    drawn = torch.stack([t for t, _ in expected]).T.tolist()
    fed = [token for first, second, _ in drawn for token in (0, first, second)]
    packed, masks = logits.transpose(0, 1).reshape(-1, V), allowed.transpose(0, 1).reshape(len(three), -1)
    for _ in range(2):  # nothing moves
        tokens, lse = ahead.look_ahead(packed, three, [0, 1, 2] * len(rows), fed, masks)
        assert tokens.view(-1, 3).T.tolist() == [t.tolist() for t, _ in expected]
        assert torch.allclose(lse.view(-1, 3).T, torch.stack([x for _, x in expected]))
    ahead.advance({i: tokens.view(-1, 3)[i, :2].tolist() for i in range(len(rows))})
    assert ahead.last_tokens.tolist() == expected[1][0].tolist()
    assert ahead.sample(logits[2], slots, allowed[2])[0].tolist() == expected[2][0].tolist()


@pytest.mark.parametrize("kernels", [True, False])
def test_looking_ahead_of_tokens_that_are_not_known_counts_none_and_needs_no_mask(device, kernels: bool) -> None:
    """As a draft model draws: rows in any order, of slots whose own steps are masked too."""
    rows = [RowSettings(), RowSettings(temperature=0.8, seed=3), RowSettings(presence_penalty=50.0)]
    made = SlotSampler(3, V, torch.device(device), kernels=kernels)
    for i, row in enumerate(rows):
        made.begin(i, row, [], [], masked=True)
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(6)).to(device)
    tokens, _ = made.look_ahead(logits[[2, 0, 1]], [2, 0, 1], [3, 3, 3])
    cpu = logits.double().cpu().numpy()
    assert tokens.tolist() == [
        sample_ref(cpu[i], replace(rows[i], presence_penalty=0.0), [], [0] * 3) for i in (2, 0, 1)
    ]
