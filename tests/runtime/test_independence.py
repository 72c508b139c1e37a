"""A request among 63 others, with jet-tiny's weights: its logits are within verify's bound of those it has alone, and
its greedy token is the same wherever the two largest logits are further apart than that."""

import pytest
import torch
from torch import Tensor

from jet_export.backends.eager import EagerEngine
from jet_export.bundle.limits import Limits
from jet_export.model.jet_nemotron import JetNemotronForCausalLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.runner import Runner
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer
from jet_export.verify.parity import FACTOR, measure, reference_engine, unit_roundoff

OTHERS, WATCHED = 63, range(0, 64, 8)
TEXT = b"def mean(values):\n    total = 0\n    for v in values:\n        total += v\n    return total / len(values)\n"
LEAST = {torch.float32: 0.9, torch.bfloat16: 0.0}  # minimum share of tokens to compare


@pytest.fixture(scope="module", params=LEAST, ids=str)
def engine(request):
    model = JetNemotronForCausalLM.from_pretrained("jet-tiny", request.param, max_positions=256)
    return EagerEngine(model, Limits(max_batch_size=OTHERS + 1, max_seq_len=256, prefill_chunk=128))


def run(engine, prompts: list[list[int]], new: list[int], budget: int) -> list[RunningSequence]:
    """Run all prompts at once, long enough that all of them decode together."""
    batching = BatchingEngine(engine, ByteTokenizer(), -1, Serving(token_budget=budget))
    out = [batching.submit(p, Params(n), lambda _: None, keep_logits=True) for p, n in zip(prompts, new, strict=True)]
    together = 0
    while batching.step():
        together = max(together, sum(not r.in_prompt for r in batching.scheduler.running))
    assert together == len(prompts)
    return out


def exact_logits(engine: EagerEngine, prompt: list[int], tokens: list[int]) -> Tensor:
    """Logits of verify's reference for the same tokens, [len(tokens), vocab]."""
    runner = Runner(engine)
    rows = [runner.prefill([0], [prompt[i : i + 128]])[0].clone() for i in range(0, len(prompt), 128)][-1:]
    rows += [runner.decode([0], torch.tensor([t]))[0].clone() for t in tokens[:-1]]
    return torch.stack(rows).float()


def test_among_others_as_alone(engine) -> None:
    text = list(TEXT * 3)
    prompts = [text[i : i + 1 + 11 * i % 128] for i in range(OTHERS + 1)]
    new = [14 - i % 4 for i in range(OTHERS + 1)]
    crowd = run(engine, prompts, new, budget=1000)
    reference, u = reference_engine(engine), unit_roundoff(engine.dtype)
    compared = total = 0
    for i in WATCHED:
        (alone,) = run(engine, [prompts[i]], [new[i]], budget=256)
        same = [a == b for a, b in zip(alone.tokens, crowd[i].tokens, strict=True)]
        shared = (same.index(False) if False in same else len(same) - 1) + 1  # after a tie the texts differ
        E, e = torch.stack(crowd[i].logits)[:shared], torch.stack(alone.logits)[:shared]
        f = exact_logits(reference, prompts[i], alone.tokens)[:shared]
        assert not measure(f"request {i}", "logits", [E, e, f], u, u).failures()
        bound = FACTOR * (e - f).abs().max() + u * e.abs().max()  # verify's bound, applied to the largest single error
        assert (E - e).abs().max() <= bound
        best, second = e.topk(2).values.T
        clear = best - second > 2 * bound  # each of the two may move by the bound
        assert all(same[t] for t in clear.nonzero()[:, 0].tolist())
        compared += int(clear.sum())
        total += len(alone.tokens)
    print(f"{engine.dtype}: greedy tokens compared: {compared} of {total} ({compared / total:.0%})")
    assert compared >= LEAST[engine.dtype] * total
