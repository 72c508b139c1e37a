"""jet-tiny's own weights: a request among 23 others has the distribution and the greedy tokens that it has alone."""

import pytest
import torch

from jet_export.bundle import Limits
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.batching import BatchingEngine, Serving
from jet_export.runtime.engine import EagerEngine
from jet_export.runtime.params import Output, Params
from jet_export.runtime.tokenizer import ByteTokenizer

BOUND = 2e-4  # of log probabilities, fp32: what a sum in another order may change; larger differences fail
TEXT = b"def mean(values):\n    total = 0\n    for v in values:\n        total += v\n    return total / len(values)\n"


@pytest.fixture(scope="module")
def engine():
    model = JetNemotronForCausalLM.from_pretrained("jet-tiny", torch.float32, max_positions=512)
    return EagerEngine(model, Limits(24, 512, 256), torch.float32, torch.float32)


def run(engine, prompts: list[list[int]], new: list[int], budget: int) -> list[list[Output]]:
    batching = BatchingEngine(engine, ByteTokenizer(), -1, Serving(token_budget=budget))
    heard: list[list[Output]] = [[] for _ in prompts]
    for prompt, n, outputs in zip(prompts, new, heard, strict=True):
        batching.submit(prompt, Params(n, logprobs=2), outputs.append)
        batching.step()
    while batching.step():
        pass
    return heard


def test_among_others_as_alone(engine) -> None:
    text = list(TEXT * 4)
    prompts = [text[3 * i : 3 * i + 1 + 7 * i] for i in range(24)]
    crowd = run(engine, prompts, [4 + i % 9 for i in range(24)], budget=48)
    compared = total = 0
    worst = 0.0
    for i in range(0, 24, 4):
        (alone,) = run(engine, [prompts[i]], [4 + i % 9], budget=256)
        for a, b in zip(alone, crowd[i], strict=True):
            total += 1
            (_, best), (_, second) = a.logprob.top
            if best - second > BOUND:
                compared += 1
                assert a.token == b.token
            elif a.token != b.token:
                break  # a tie; from here on they are different texts
            worst = max(worst, abs(best - b.logprob.top[0][1]), abs(second - b.logprob.top[1][1]))
    print(f"tokens compared: {compared} of {total}; largest difference {worst:.1e}")
    assert worst < BOUND
    assert compared >= 0.9 * total
