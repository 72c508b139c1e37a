"""kernels/token_logprobs.py: kernel = reference = log_softmax, whatever the vocabulary and the dtype."""

import pytest
import torch

from jet_export.kernels.token_logprobs import token_logprobs_triton
from jet_export.kernels.token_logprobs_ref import token_logprobs_ref
from jet_export.runtime.logprobs import token_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + vocab)
    logits = 5 * torch.randn(n, vocab + 3, generator=generator)[:, :vocab]  # rows with a stride
    return logits.to(dtype).to(device), torch.randint(vocab, (n,), generator=generator).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (3, 63), (2, 128), (70, 129), (2, 2048), (3, 5000)])
def test_both_are_log_softmax(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, tokens = problem(n, vocab, dtype, device)
    exact = logits.double().log_softmax(-1)
    expected = exact.gather(1, tokens[:, None])[:, 0]
    for found in (token_logprobs_ref(logits, tokens), token_logprobs_triton(logits, tokens)):
        torch.testing.assert_close(found.chosen.double(), expected, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(found.best.double(), exact.max(-1).values, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(found.lse.double(), logits.double().logsumexp(-1), atol=1e-5, rtol=1e-6)
        assert torch.equal(logits.gather(1, found.best_token.long()[:, None])[:, 0], logits.max(-1).values)


def test_the_most_likely_token_has_the_best_log_probability_exactly(device: torch.device) -> None:
    """Also one of several: harnesses compare the two for equality."""
    logits, _ = problem(40, 300, torch.bfloat16, device)
    logits[:, [7, 150, 299]] = 40.0
    for token in (7, 150, 299):
        tokens = torch.full((40,), token, device=device)
        for found in (token_logprobs_ref(logits, tokens), token_logprobs_triton(logits, tokens)):
            assert torch.equal(found.chosen, found.best)
            assert found.best_token.tolist() == [7] * 40


def test_tokens_that_cannot_come_and_rows_that_are_not_finite(device: torch.device) -> None:
    logits = torch.zeros(3, 100, device=device)
    logits[0, 5:] = -float("inf")
    logits[1, 50] = float("nan")
    tokens = torch.tensor([60, 3, 3], device=device)
    for found in (token_logprobs_ref(logits, tokens), token_logprobs_triton(logits, tokens)):
        assert found.chosen[0] == -float("inf") and found.lse[0] == pytest.approx(1.6094379)
        assert found.chosen[1].isnan() and found.chosen[2] == pytest.approx(-4.6051702)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    logits, tokens = problem(300, 151936, dtype, device)
    found, expected = token_logprobs(logits, tokens), token_logprobs_ref(logits, tokens)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-6)
