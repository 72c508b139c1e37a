"""Sessions: stopping, saving, loading, moving and forking change no bit of the continuation."""

import asyncio
import json
import struct
from typing import Any

import pytest
import torch
from helpers.eager_bundle import eager_engine, eager_llm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from jet_export.bundle.limits import Limits
from jet_export.model.cache import PAGE
from jet_export.runtime.async_llm import AsyncLLM
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.params import Params
from jet_export.runtime.runner import PoolSize, Runner
from jet_export.runtime.sessions import Session
from jet_export.runtime.snapshot import load_states, save_states
from jet_export.utils.errors import JetExportError

LIMITS = Limits(max_batch_size=3, max_seq_len=400, prefill_chunk=48)
FP8 = torch.float8_e4m3fn
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp8 kv": {"dtype": torch.bfloat16, "kv_dtype": FP8},
}


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 128, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=DTYPES)
def pair(request, device):
    """Two LLMs over the same weights."""
    return tuple(eager_llm(LIMITS, device=device, **DTYPES[request.param]) for _ in range(2))


@pytest.fixture(scope="module")
def llm(device):
    return eager_llm(LIMITS, device=device)


def same(a, b) -> bool:
    return a.token_ids == b.token_ids and torch.equal(a.logits, b.logits)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_restored_continuation_is_the_uninterrupted_one_to_the_bit(pair, tmp_path_factory, data) -> None:
    """Cut anywhere in the prompt and the completion, saved, and loaded by another LLM whose pools have been used."""
    here, there = pair
    directory = tmp_path_factory.mktemp("sessions")
    length = data.draw(st.integers(1, 300), "prompt")
    cut, new = data.draw(st.integers(0, length), "cut"), data.draw(st.integers(2, 8), "new")
    stop = data.draw(st.integers(1, new - 1), "stop")
    row = prompt(length, length)

    whole = here.session(row[:cut])
    (expected,) = here.generate([row[cut:]], new, return_logits=True, session=whole)

    def moved(session: Session) -> Session:
        here.save_session(session, directory / "s")
        there.generate([prompt(150, 7)] * 2, 2)
        return there.load_session(directory / "s")

    session = moved(here.session(row[:cut]))
    (first,) = there.generate([row[cut:]], stop, return_logits=True, session=session)
    session = moved(session)
    (second,) = there.generate([[]], new - stop, return_logits=True, session=session)
    assert first.token_ids + second.token_ids == expected.token_ids
    assert torch.equal(torch.cat((first.logits, second.logits)), expected.logits)
    assert session.tokens == whole.tokens == row + expected.token_ids
    assert session.snapshot.held == length + new - 1


def test_a_session_equals_generate_without_one(pair) -> None:
    llm, _ = pair
    row = prompt(70)
    (plain,) = llm.generate([row], 9, return_logits=True)
    (in_session,) = llm.generate([[]], 9, return_logits=True, session=llm.session(row))
    (empty,) = llm.generate([row], 9, return_logits=True, session=llm.new_session())
    assert same(plain, in_session) and same(plain, empty)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("held", [1, 47, PAGE, PAGE + 1, 3 * PAGE - 1])
def test_another_slot_other_pages_and_another_ring_change_no_bit(device, kind: str, held: int) -> None:
    """From pools with contiguous pages per slot to a smaller ring on scattered pages full of garbage."""
    engine = eager_engine(
        Limits(max_batch_size=2, max_seq_len=3 * PAGE + 60, prefill_chunk=200), device=device, **DTYPES[kind]
    )
    a, row = Runner(engine), prompt(held + 20)
    sizes = PoolSize(slots=5, pages=11, window_pages=9, table_pages=4, ring_pages=3)
    b = Runner(engine, pools=sizes)
    for state in b.states:
        state.view(torch.uint8).fill_(1)
    for start in range(0, held, 100):
        a.prefill([1], [row[start : min(start + 100, held)]])
    b.assign(3, [7, 2, 9, 4], [8, 0, 5])
    load_states(b, 3, held, save_states(a, 1))
    a.reset(0)
    outs = []
    for runner, slot in ((a, 1), (b, 3)):
        logits = [runner.prefill([slot], [row[held:]], all_logits=True).clone()]
        for token in (5, 6, 7):
            logits.append(runner.decode([slot], torch.tensor([token], device=runner.device)).clone())
        outs.append((torch.cat(logits), save_states(runner, slot)))
    assert torch.equal(outs[0][0], outs[1][0])
    for name, x in outs[0][1].items():
        assert torch.equal(x.view(torch.uint8), outs[1][1][name].view(torch.uint8)), name


def test_forks_are_independent(llm) -> None:
    row = prompt(60)
    root = llm.session(row)
    left, right = llm.fork(root), llm.fork(root)
    hot = {"temperature": 2.0, "return_logits": True}
    (a,) = llm.generate([[1, 2]], 6, session=left, **hot)
    (b,) = llm.generate([[3]], 6, session=right, **hot)
    assert root.tokens == row and left.tokens == [*row, 1, 2, *a.token_ids]
    again = [llm.fork(root), llm.fork(root)]
    both = llm.generate([[1, 2], [3]], 6, temperature=2.0, session=again)
    assert both[0].token_ids == a.token_ids and len(right.tokens) == 61 + len(b.token_ids)


def test_a_saved_session_contains_nothing_of_other_requests(llm, tmp_path) -> None:
    """Saved from pages that others used before, the file is the same."""
    row = prompt(37)
    fresh, used = eager_llm(LIMITS, device=llm.engine.device), eager_llm(LIMITS, device=llm.engine.device)
    used.generate([prompt(380, i) for i in range(3)], 2)
    sums = []
    for name, one in (("a", fresh), ("b", used)):
        one.save_session(one.session(row), tmp_path / name)
        with safe_open(tmp_path / name, "pt") as f:
            sums.append(f.metadata()["sha256"])  # of every byte
    assert sums[0] == sums[1]


def test_an_empty_session_can_be_saved(llm, tmp_path) -> None:
    llm.save_session(llm.new_session(), tmp_path / "s")
    loaded = llm.load_session(tmp_path / "s")
    assert llm.generate([[5, 6]], 3, session=loaded)[0].token_ids == llm.generate([[5, 6]], 3)[0].token_ids


@pytest.fixture
def saved(llm, tmp_path):
    session = llm.session(prompt(130))
    llm.generate([[4]], 3, session=session)
    llm.save_session(session, tmp_path / "s")
    return tmp_path / "s"


def header(data: bytes) -> tuple[dict, bytes]:
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def rewritten(data: bytes, change) -> bytes:
    head, rest = header(data)
    change(head)
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + rest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:-1], "damaged or truncated"),
        (lambda d: d[:5], "damaged or truncated"),
        (lambda d: b"", "damaged or truncated"),
        (lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], r"damaged \(sha256 differs\)"),
        (lambda d: rewritten(d, lambda h: h["__metadata__"].update(held="131")), "sha256 differs"),
        (lambda d: rewritten(d, lambda h: h["__metadata__"].update(format="x")), "not a session file"),
        (lambda d: rewritten(d, lambda h: h.pop("__metadata__")), "not a session file"),
    ],
)
def test_damaged_files_are_refused(llm, saved, damage, message: str) -> None:
    assert len(llm.load_session(saved).tokens) == 134
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(JetExportError, match=message):
        llm.load_session(saved)


def test_sessions_of_another_bundle_are_refused(llm, saved, tmp_path) -> None:
    other = eager_llm(LIMITS, seed=1)
    with pytest.raises(JetExportError, match="belongs to another bundle"):
        other.load_session(saved)
    with pytest.raises(JetExportError, match="belongs to another bundle"):
        other.generate([[1]], 2, session=llm.new_session())
    short = eager_llm(Limits(max_batch_size=1, max_seq_len=100, prefill_chunk=48))
    with pytest.raises(JetExportError, match="holds 133 tokens; the bundle's max_seq_len is 100"):
        short.load_session(saved)
    wide = eager_llm(LIMITS, dtype=torch.bfloat16)
    with pytest.raises(JetExportError, match="not those of this bundle's model"):
        wide.load_session(saved)
    with pytest.raises(JetExportError, match="no such file"):
        llm.load_session(tmp_path / "none")
    with pytest.raises(JetExportError, match="cannot be read"):
        llm.load_session(tmp_path)


def test_saving_is_atomic(llm, tmp_path, monkeypatch) -> None:
    session = llm.session(prompt(10))
    with pytest.raises(JetExportError, match="cannot be written"):
        llm.save_session(session, tmp_path / "no" / "s")
    llm.save_session(session, tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(JetExportError, match="No space left"):
        llm.save_session(llm.session(prompt(12)), tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and (tmp_path / "s").read_bytes() == before


def test_continuations_that_do_not_fit_are_refused(llm) -> None:
    session = llm.session(prompt(390))
    with pytest.raises(JetExportError, match="a session of 390 tokens, 5 tokens and 6 new ones exceed"):
        llm.generate([prompt(5)], 6, session=session)
    with pytest.raises(JetExportError, match="2 prompts and 1 sessions"):
        llm.generate([[1], [2]], 2, session=session)
    with pytest.raises(JetExportError, match="same session is given for two"):
        llm.generate([[1], [2]], 2, session=[session, session])
    with pytest.raises(JetExportError, match="prompt 0 is empty"):
        llm.generate([[]], 2, session=llm.new_session())
    assert len(session.tokens) == 390


def test_async_sessions(llm, tmp_path) -> None:
    """Two conversations at once over a running engine; an LLM continues one of them from a file."""
    batching = BatchingEngine(llm.engine, llm.tokenizer, -1, Serving())
    served = AsyncLLM.over(batching, llm.fingerprint)
    served.start()
    rows = [prompt(50, 1), prompt(9, 2)]

    async def turn(prompts: list[list[int]], sessions: list[Session]) -> list[list[int]]:
        generated: list[list[int]] = [[] for _ in prompts]
        async for i, output in served.stream(prompts, Params(4), sessions):
            assert output.token is not None
            generated[i].append(output.token)
            with pytest.raises(JetExportError, match="in use"):
                await anext(served.stream([[1]], Params(1), [sessions[i]]))
        return generated

    sessions = [served.new_session(), served.new_session()]
    try:
        held = asyncio.run(served.session(rows[0]))
        first = asyncio.run(turn(rows, sessions))
        second = asyncio.run(turn([[3], []], sessions))
        served.save_session(sessions[0], tmp_path / "s")
    finally:
        served.stop()
    assert sessions[0].tokens == [*rows[0], *first[0], 3, *second[0]]
    assert sessions[1].tokens == [*rows[1], *first[1], *second[1]]
    assert llm.generate([[]], 4, session=held)[0].token_ids == first[0]
    again = llm.new_session()
    assert llm.generate([rows[1]], 4, session=again)[0].token_ids == first[1]
    assert llm.generate([[]], 4, session=again)[0].token_ids == second[1]
    assert llm.load_session(tmp_path / "s").tokens == sessions[0].tokens


def test_a_cancelled_request_leaves_its_session_as_it_was(llm) -> None:
    batching = BatchingEngine(llm.engine, llm.tokenizer, -1, Serving())
    served = AsyncLLM.over(batching, llm.fingerprint)
    served.start()
    session = llm.session(prompt(20))
    before = session.snapshot

    async def main() -> None:
        stream = served.stream([[1, 2]], Params(200), [session])
        await anext(stream)
        await stream.aclose()

    try:
        asyncio.run(main())
    finally:
        served.stop()
    assert session.snapshot is before and not session.busy
