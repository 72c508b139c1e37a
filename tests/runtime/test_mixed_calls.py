"""A mixed call of the runner equals the decode and the prefill call that it stands for, by CUDA graph and without."""

import threading
from itertools import pairwise

import pytest
import torch
from helpers.eager_bundle import eager_engine

from jet_export.bundle.limits import Limits
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Output, Params
from jet_export.runtime.runner import Runner
from jet_export.runtime.tokenizer import ByteTokenizer

LIMITS = Limits(max_batch_size=6, max_seq_len=400, prefill_chunk=64)


def text(n: int, seed: int) -> list[int]:
    return torch.randint(0, 60, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("cuda_graphs", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_mixed_call_is_a_decode_and_a_prefill_call(device: torch.device, cuda_graphs: bool) -> None:
    """Slots 4 and 1 decode, 0 goes on with its prompt, 5 begins, and 2 and 3 stay as they are; then all decode."""
    engine = eager_engine(LIMITS, device=device)
    together, apart = Runner(engine, cuda_graphs), Runner(engine, cuda_graphs)
    starts = {slot: text(n, slot) for slot, n in ((0, 64), (1, 3), (2, 40), (3, 1), (4, 33))}
    for runner in (together, apart):
        runner.prefill(list(starts), list(starts.values()))
        runner.last_tokens.copy_(torch.tensor([9, 8, 7, 6, 5, 4]))
    for calls in range(3):  # the second and third replay the first one's graph
        chunks = [text(31, 50 + calls), text(20 + calls, 60 + calls)]
        mixed = together.mixed([4, 0, 1, 5], [None, chunks[0], None, chunks[1]]).clone()
        decoded = apart.decode([4, 1]).clone()
        prompts = apart.prefill([0, 5], chunks)
        want = torch.stack([decoded[0], prompts[0], decoded[1], prompts[1]])
        torch.testing.assert_close(mixed, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert together.context_lens == apart.context_lens == [157, 6, 40, 1, 36, 63]
    after = [runner.decode(list(range(6))).clone() for runner in (together, apart)]
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-4 * after[0].abs().max().item())
    assert len(together.graphs.mixed) == cuda_graphs


def test_the_tables_are_read_when_the_call_runs(device: torch.device) -> None:
    """The tables are gathered on the device: a slot's new pages are those of the next call, with no upload between."""
    engine = eager_engine(LIMITS, device=device)
    logits = []
    for pages in ([0, 1, 2, 3], [3, 1, 0, 2]):
        runner = Runner(engine, cuda_graphs=False)
        runner.block_table[2, :4] = torch.tensor(pages, dtype=torch.int32, device=device)
        parts = text(200, 1)
        steps = [runner.mixed([2], [parts[a:b]]).clone() for a, b in pairwise(range(0, 201, 50))]
        logits.append(torch.cat(steps))
    assert torch.equal(*logits)


@pytest.mark.gpu
def test_a_service_has_every_graph_before_its_first_request(device: torch.device) -> None:
    engine = eager_engine(LIMITS, device=device)
    batching = BatchingEngine(engine, ByteTokenizer(), -1, Serving(slots=6, token_budget=128))
    batching.start()
    try:
        graphs = batching.runner.graphs
        captured = len(graphs.mixed), len(graphs.decode)
        ended = threading.Semaphore(0)

        def hear(output: Output) -> None:
            if output.finish_reason:
                ended.release()

        for i in range(24):
            batching.submit(text(1 + 13 * i % 90, i), Params(5 + i), hear)
        assert all(ended.acquire(timeout=60) for _ in range(24))
    finally:
        batching.stop()
    assert all(captured) and (len(graphs.mixed), len(graphs.decode)) == captured
