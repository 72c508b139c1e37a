"""The kernels of jet::attention: kernel = reference, and the laws of a cache. Interpreted without a GPU."""

from dataclasses import replace

import pytest
import torch
from helpers.compare import relative_error, same_bits
from helpers.kernel_compiler import compile_report
from helpers.paged import FP8, Case, in_steps, interpreter_fp8, make_case, pick, poison
from helpers.poison import poisoned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAGGED = ([5, 1, 40, 3], [0, 5, 21, 63])
DECODE = ([1, 1, 1], [0, 16, 75])


@pytest.fixture(autouse=True)
def exact_fp8_and_no_lucky_memory(monkeypatch):
    if DEVICE == "cpu":
        interpreter_fp8(monkeypatch)
    with poisoned():
        yield


def assert_kernel_is_reference(c: Case, form: str) -> None:
    expected, expected_cache = c.run("ref")
    o, cache = c.run(form, DEVICE)
    assert relative_error(o, expected) < 2e-6
    if cache.dtype == FP8:
        # A multiply-add contracted on the GPU may move a key across a rounding boundary.
        different = (cache.view(torch.uint8) != expected_cache.view(torch.uint8)).float().mean()
        assert different <= (1e-3 if DEVICE == "cuda" else 0)
    else:
        assert torch.allclose(cache, expected_cache, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [{"heads": (6, 1), "rotary": 8}, {"window": 20}, {"cache_dtype": FP8, "k_scale": 0.02, "v_scale": 0.5}],
    ids=str,
)
def test_verification_is_the_reference(options):
    """From no tokens held on, up to 16 a sequence, over several splits."""
    assert_kernel_is_reference(poison(make_case([3, 1, 16], [0, 5, 40], **options)), "verify")


def test_padding_rows_of_a_verification_are_inert():
    c = make_case([20, 2], [0, 30])  # the padding row takes more tokens than any other may have
    c = poison(replace(c, slots=torch.tensor([-1, 0], dtype=torch.int32)))
    o, cache = c.run("verify", DEVICE)
    alone, _ = pick(c, [1]).run("verify", DEVICE)
    assert not o[:20].any() and relative_error(o[20:], alone) < 1e-6
    assert torch.equal(cache[c.block_table[0].long()].isnan(), c.kv_cache[c.block_table[0].long()].isnan())


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("form, lens, context", [("prefill", *RAGGED), ("prefill", *DECODE), ("decode", *DECODE)])
def test_kernel_is_reference(form, lens, context, window):
    assert_kernel_is_reference(poison(make_case(lens, context, window=window)), form)


@pytest.mark.parametrize("form", ["prefill", "decode"])
@pytest.mark.parametrize(
    "options",
    [
        {"heads": (1, 1)},
        {"heads": (6, 1)},
        {"heads": (16, 2)},
        {"head_dim": 48},
        {"head_dim": 128, "page": 32},
        {"head_dim": 256, "rotary": 64},
        {"head_dim": 48, "rotary": 2, "cache_dtype": FP8, "k_scale": 0.02},
        {"cache_dtype": FP8, "k_scale": 0.02, "v_scale": 0.5},
        {"cache_dtype": FP8, "k_scale": 1e-3, "v_scale": 1e-3, "window": 20},
    ],
    ids=str,
)
def test_kernel_is_reference_in_any_size(form, options):
    lens, context = ([1, 1], [3, 35]) if form == "decode" else ([2, 17], [30, 3])
    assert_kernel_is_reference(poison(make_case(lens, context, **options)), form)


@pytest.mark.parametrize("form", ["ref", "prefill"])
@pytest.mark.parametrize(
    "options", [{}, {"window": 7}, {"cache_dtype": FP8, "k_scale": 0.02, "v_scale": 0.02}], ids=str
)
def test_chunks_are_the_whole(form, options):
    """In FP8 too, since a whole prompt reads its keys back from the cache just as its chunks do."""
    c = make_case([26, 26], [0, 9], heads=(2, 1), **options)
    whole, _ = c.run(form, DEVICE)
    for steps in ([1, 2, 3, 20], [25, 1]):
        assert relative_error(in_steps(c, steps, form, DEVICE), whole) < 2e-6


@pytest.mark.parametrize("window", [0, 7])
def test_decode_continues_prefill(window):
    c = make_case([6, 6], [14, 30], window=window)
    whole, _ = c.run("ref")
    assert relative_error(in_steps(c, [1] * 6, "decode", DEVICE), whole) < 2e-6


@pytest.mark.parametrize("form", ["ref", "prefill"])
def test_packed_is_one_by_one(form):
    c = make_case(*RAGGED, window=20)
    o, _ = c.run(form, DEVICE)
    alone = [pick(c, [n]).run(form, DEVICE)[0] for n in range(len(c.slots))]
    assert relative_error(o, torch.cat(alone)) < 2e-6


@pytest.mark.parametrize("form", ["ref", "prefill", "decode"])
def test_a_ring_is_an_unbounded_table(form):
    """A row of cdiv(window + chunk, page) + 1 pages holds all that a window needs, however long the sequence."""
    window, chunk, page = 20, 10, 16
    table = make_case([64], [0], heads=(2, 1), window=window, page=page)
    ring = replace(table, block_table=table.block_table[:, : -(-(window + chunk) // page) + 1].contiguous())
    steps = [chunk] * 5 + [1] * 14 if form == "decode" else [chunk] * 6 + [4]
    assert relative_error(in_steps(ring, steps, form, DEVICE), table.run("ref")[0]) < 2e-6


@pytest.mark.blas
@pytest.mark.parametrize("form", ["ref", "prefill", "decode"])
def test_page_order_is_irrelevant(form):
    c = make_case(*DECODE)
    order = torch.randperm(c.kv_cache.shape[0], generator=torch.Generator().manual_seed(1))
    moved = replace(c, kv_cache=c.kv_cache[order], block_table=order.argsort()[c.block_table.long()].int())
    assert torch.equal(c.run(form, DEVICE)[0], moved.run(form, DEVICE)[0])


@pytest.mark.blas
@pytest.mark.parametrize("form", ["ref", "prefill", "decode"])
def test_padding_rows_are_inert(form):
    """Nothing is read (their pages are NaN) or written, outputs are zero, and the other rows are unaffected."""
    c = make_case(*(DECODE if form == "decode" else RAGGED))
    live = [0, *range(2, len(c.slots))]
    c.slots[1] = -1
    c = poison(c)
    o, cache = c.run(form, DEVICE)
    padding = slice(*c.cu_seqlens[1:3].tolist())
    assert o[padding].eq(0).all()
    expected, expected_cache = pick(c, live).run(form, DEVICE)
    assert torch.equal(torch.cat((o[: padding.start], o[padding.stop :])), expected)
    assert same_bits(cache, expected_cache)


@pytest.mark.parametrize("form", ["ref", "prefill", "decode"])
def test_positions_beyond_the_table_stay_in_their_pages(form):
    c = make_case([1, 1] if form == "decode" else [9, 2], [60, 3], page=16, M=2)
    _, cache = c.run(form, DEVICE)
    others = [i for i in range(len(cache)) if i not in c.block_table]
    assert same_bits(cache[others], c.kv_cache[others])


@pytest.mark.parametrize("form", ["ref", "prefill", "decode"])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_is_detected(form, off):
    """The comparisons above can fail: one key more or less changes the output by a thousand times their tolerance."""
    c = make_case(*(DECODE if form == "decode" else RAGGED), window=8)
    o, _ = replace(c, window=8 + off).run(form, DEVICE)
    assert relative_error(o, c.run("ref")[0]) > 2e-3


@pytest.mark.parametrize("form", ["prefill", "decode"])
def test_bad_layouts_are_refused(form):
    c = make_case([1], [3])
    with pytest.raises(ValueError, match="pages of 24 tokens: a power of two"):
        replace(c, kv_cache=torch.zeros(4, 2, 2, 24, 32)).run(form)
    with pytest.raises(ValueError, match="head_dim 32 \\(cache: 64\\)"):
        replace(c, kv_cache=torch.zeros(4, 2, 2, 16, 64)).run(form)
    with pytest.raises(ValueError, match="contiguous within a page"):
        replace(c, kv_cache=torch.zeros(4, 2, 2, 32, 16).transpose(3, 4)).run(form)


def test_kernels_fit_sm_90():
    """Compiled ahead of time with the configurations in use: shared memory fits, no global scratch, few spills."""
    cases = ["bfloat16-128-1152", "float8_e4m3fn-128-0", "bfloat16-256-0", "float32-64-0"]
    report = compile_report(cases)
    assert len(report) == 7 * len(cases)  # append, prefill; decode, combine; append, verify, combine
    for kernel in report:
        assert kernel["shared"] <= 227 * 1024 and kernel["scratch"] == kernel["f64"] == 0, kernel
        assert kernel["stack"] <= 128, kernel


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("form", ["prefill", "decode"])
@pytest.mark.parametrize(
    "dtype, cache_dtype",
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, FP8), (torch.float16, None)],
    ids=str,
)
def test_on_the_gpu(dtype, cache_dtype, form, window):
    """The configurations in use. 16 bits: p and o are rounded once each; the cache has torch's bits."""
    lens, context = ([1] * 4, [0, 1500, 64, 383]) if form == "decode" else ([300, 1, 37, 129], [0, 700, 64, 383])
    options = {"heads": (12, 2), "head_dim": 128, "page": 128, "k_scale": 0.03, "v_scale": 0.03}
    c = poison(make_case(lens, context, dtype=dtype, cache_dtype=cache_dtype, window=window, **options))
    expected, expected_cache = c.run("ref")
    o, cache = c.run(form, "cuda", small=False)
    assert relative_error(o, expected) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    if dtype != torch.float32:
        assert same_bits(cache, expected_cache)


@pytest.mark.gpu
@pytest.mark.parametrize("lens, context", [([300, 1, 37], [0, 5, 300]), ([1, 1, 1], [0, 16, 470])])
def test_compiled_and_captured(lens, context):
    """torch.compile traces the launches with symbolic sizes, and a CUDA graph replays them on new contents."""
    c = make_case(lens, context, heads=(12, 2), head_dim=128, page=128, dtype=torch.bfloat16, window=200)
    eager, compiled, captured = (c.op_args("cuda") for _ in range(3))
    o = torch.ops.jet.attention(*eager)
    f = torch.compile(lambda *a: torch.ops.jet.attention(*a), fullgraph=True, dynamic=True)
    assert torch.equal(o, f(*compiled)) and same_bits(eager[2], compiled[2])

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o_graph = torch.ops.jet.attention(*captured)
    graph.replay()
    assert torch.equal(o, o_graph)
    for x in (eager, captured):
        x[0].mul_(0.5)
        x[6].add_(1)
    graph.replay()
    assert torch.equal(torch.ops.jet.attention(*eager), o_graph) and same_bits(eager[2], captured[2])
