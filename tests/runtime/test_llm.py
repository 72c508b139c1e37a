"""LLM.generate over the eager engine: equal to a plain loop over the model, whatever the batch, chunks and lengths."""

import pytest
import torch
from helpers.eager_bundle import eager_llm

from jet_export.bundle.limits import Limits
from jet_export.runtime.runner import Runner
from jet_export.runtime.tokenizer import ByteTokenizer, TextStream
from jet_export.utils.errors import JetExportError


def greedy_loop(llm, prompt: list[int], n: int) -> tuple[list[int], torch.Tensor]:
    model = llm.engine.model
    device = llm.engine.device
    cache = model.new_cache(1, len(prompt) + n)
    logits = model(torch.tensor([prompt], device=device), cache=cache)[:, -1]
    out, kept = [], []
    for _ in range(n):
        out.append(int(logits.argmax(-1)))
        kept.append(logits[0].float().cpu())
        logits = model(torch.tensor([[out[-1]]], device=device), cache=cache)[:, -1]
    return out, torch.stack(kept)


def prompts(*lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 128, (n,), generator=rng).tolist() for n in lengths]


@pytest.fixture(scope="module")
def llm(device):
    return eager_llm(Limits(max_batch_size=3, max_seq_len=200, prefill_chunk=32), device=device)


def test_ragged_batch_equals_a_plain_loop(llm) -> None:
    """Five prompts in three slots, some several chunks long, so that slots are reused."""
    rows = prompts(5, 150, 1, 33, 64)
    done = llm.generate(rows, max_new_tokens=8, return_logits=True)
    for row, completion in zip(rows, done, strict=True):
        tokens, logits = greedy_loop(llm, row, 8)
        assert completion.token_ids == tokens
        assert completion.logits.shape == (8, 128)
        assert torch.allclose(completion.logits, logits, rtol=1e-3, atol=1e-4)
        assert completion.finish_reason == "length"


def test_end_of_sequence_stops_one_row_only(llm, monkeypatch) -> None:
    rows = prompts(5, 9, 20)
    free = llm.generate(rows, max_new_tokens=10)
    stop = free[1].token_ids[3]
    monkeypatch.setattr(llm, "eos", stop)
    for before, after in zip(free, llm.generate(rows, max_new_tokens=10), strict=True):
        cut = before.token_ids.index(stop) + 1 if stop in before.token_ids else 10
        assert after.token_ids == before.token_ids[:cut]
        assert after.finish_reason == ("stop" if stop in before.token_ids else "length")
    assert [len(c.token_ids) for c in llm.generate(rows, 10, ignore_eos=True)] == [10, 10, 10]


def test_on_token_sees_every_token_in_order(llm) -> None:
    rows = prompts(3, 4, 5, 6)
    seen: list[list[int]] = [[] for _ in rows]
    done = llm.generate(rows, max_new_tokens=5, temperature=1.0, seed=3, on_token=lambda i, t: seen[i].append(t))
    assert seen == [c.token_ids for c in done]


def test_text_prompt_and_decoding(llm) -> None:
    (completion,) = llm.generate("hello", max_new_tokens=4)
    assert completion.text == ByteTokenizer().decode(completion.token_ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 0 is empty"),
        ([[]], "prompt 0 is empty"),
        ([[1], [128]], "prompt 1: token 128 is not below vocab_size 128"),
        ([[-1]], "token -1"),
        ([[1] * 198], "198 tokens and 5 new ones exceed the bundle's max_seq_len 200"),
    ],
)
def test_bad_prompts_are_refused(llm, prompt, message: str) -> None:
    with pytest.raises(JetExportError, match=message):
        llm.generate(prompt, max_new_tokens=5)


def test_padding_row_is_inert(llm) -> None:
    """A padding row in a decode batch leaves the logits of the others as they are, and writes no state."""
    runner = Runner(llm.engine)
    row = prompts(20)[0]
    runner.prefill([1], [row])
    batch = runner.batch([1, 0], [1, 1])
    batch.slots[1] = -1
    before = [s.clone() for s in runner.states]
    ids = torch.tensor([7, 9], device=runner.device)
    logits = llm.engine.decode(ids, batch, runner.states)
    alone = [s.clone() for s in before]
    expected = llm.engine.decode(ids[:1], runner.batch([1], [1]), alone)
    assert torch.allclose(logits[:1], expected, rtol=1e-4, atol=1e-5)
    for got, want in zip(runner.states, alone, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_text_stream_never_splits_a_character() -> None:
    class Utf8(ByteTokenizer):
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    text = "naïve → 漢字 ok"
    stream = TextStream(Utf8())
    parts = [stream.push(b) for b in text.encode()]
    assert "".join(parts) == text
    assert all("�" not in p for p in parts)


@pytest.mark.gpu
def test_cuda_graph_decode_equals_plain_decode(device) -> None:
    limits = Limits(max_batch_size=6, max_seq_len=200, prefill_chunk=64)
    llm = eager_llm(limits, device=device)
    rows = prompts(5, 30, 1, 33, 64)
    with_graphs = llm.generate(rows, max_new_tokens=20, return_logits=True)
    assert llm.runner.graphs.decode
    plain = eager_llm(limits, device=device, cuda_graphs=False)
    for a, b in zip(with_graphs, plain.generate(rows, max_new_tokens=20, return_logits=True), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logits is not None and b.logits is not None
        assert torch.allclose(a.logits, b.logits, rtol=1e-3, atol=1e-4)


def test_a_failure_is_raised_and_leaves_nothing_behind(llm, monkeypatch) -> None:
    """A failure of the engine, and one of the caller's on_token; the next call finds every slot free."""

    def broken(*_):
        raise RuntimeError("the device is gone")

    def stop(i: int, token: int) -> None:
        raise KeyboardInterrupt

    before = llm.generate(prompts(5, 9), 6)
    with monkeypatch.context() as m:
        m.setattr(llm.batching.runner, "decode", broken)  # a captured graph would not call the engine
        with pytest.raises(JetExportError, match=r"prompt 0: the engine failed \(the device is gone\)"):
            llm.generate(prompts(5, 9), 6)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts(5, 9), 6, on_token=stop)
    with pytest.raises(JetExportError, match="max_seq_len"):
        llm.generate([*prompts(5), [1] * 199], 6)
    scheduler = llm.batching.scheduler
    assert scheduler.slots.used == scheduler.pages.used == 0 and not llm.batching.sequences
    assert [c.token_ids for c in llm.generate(prompts(5, 9), 6)] == [c.token_ids for c in before]


def test_a_prompt_s_sample_depends_on_its_own_seed(llm) -> None:
    row = prompts(20)[0]
    hot = {"max_new_tokens": 8, "temperature": 1.5}
    together = [c.token_ids for c in llm.generate([row, row, row], seed=4, **hot)]
    assert together == [llm.generate([row], seed=4 + i, **hot)[0].token_ids for i in range(3)]
    assert together[0] != together[1]
