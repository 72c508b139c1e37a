"""What every search keeps to, shown with latencies that follow a formula: nothing is built here."""

import json
import math
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.eager_bundle import mini_config
from helpers.fake_executor import SPACE, FakeExecutor, engine_ms, prepared, searched
from helpers.paths import BENCHMARKS
from hypothesis import given
from hypothesis import strategies as st

from jet_export.build.plan import BuildOptions, make_plan
from jet_export.model.config import JetDims, JetNemotronConfig
from jet_export.search import charts
from jet_export.search.cells import Cell, base_cell, cells_of, whole_cell
from jet_export.search.choose import Selector
from jet_export.search.database import Database
from jet_export.search.evaluation import Evaluation
from jet_export.search.output import build_command, write_results
from jet_export.search.points import Point, all_points
from jet_export.search.report import report
from jet_export.search.run import build_engines, run_search
from jet_export.search.terminal import plan_lines, summary_lines
from jet_export.utils.errors import JetExportError

CELLS = 4 + 2 + 1  # the jet sizes, attn and swa layers, the base


def test_a_model_is_its_base_and_its_layers(tmp_path) -> None:
    search = prepared(tmp_path)
    searched(search)
    able = [e for e in search.state.evaluations.values() if e.predicted]
    assert len(able) == 4
    for e in able:
        assert e.predicted is not None and e.config is not None
        for (batch, context, phase), ms in e.predicted.items():
            assert ms == pytest.approx(engine_ms(whole_cell(e.point, e.config), batch, context, phase), rel=1e-9)
    built = [e for e in able if e.measured]
    assert 1 <= len(built) <= 3
    assert all(abs(e.error((4, 256, "decode")) or 0.0) < 1e-9 for e in built)


def test_each_engine_is_built_and_measured_once(tmp_path) -> None:
    search = prepared(tmp_path, whole=0)
    executor = searched(search)
    points = list(all_points(search.spec.space, search.spec.preset))
    cells = {c.key for p in points for c in cells_of(p, search.spec.preset, search.spec.space)}
    assert len(cells) == CELLS
    assert set(executor.builds) == cells
    assert set(executor.builds.values()) == {1}
    assert set(executor.measured.values()) == {1}
    assert len(executor.measured) == len(cells) * 4


def test_a_cell_survives_json() -> None:
    config = replace(mini_config(), raw={}).with_jet_dims({0: JetDims(4, 16, 48), 2: JetDims(2, 32, 32)})
    for cell in (
        Cell(kind="whole", config=config, layers=4, fp8=True, state_dtype="bfloat16", kv_cache_dtype="fp8"),
        base_cell(config),
    ):
        again = Cell.from_dict(json.loads(json.dumps(cell.describe())))
        assert again.key == cell.key
        assert again == cell


@pytest.mark.parametrize("operations", [0, 1, 4, 7, 9, 13, 17, 22, 29])
def test_a_kill_loses_no_measurement(tmp_path, operations: int) -> None:
    first = prepared(tmp_path, jobs=2)
    with pytest.raises(KeyboardInterrupt):
        searched(first, die_after=operations)
    kept = Database(first.spec.database_file).count()
    with pytest.raises(JetExportError, match="holds this search already"):
        searched(prepared(tmp_path, jobs=2))
    executor = searched(prepared(tmp_path, jobs=2, resume=True))
    whole = searched(prepared(tmp_path, jobs=2, output=tmp_path / "o2", database=tmp_path / "n.db"))
    assert sum(executor.measured.values()) == sum(whole.measured.values()) - kept // 2  # two phases a case
    assert set(executor.measured.values()) <= {1}


def test_a_resumed_search_has_the_results_of_an_uninterrupted_one(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        searched(prepared(tmp_path), die_after=11)
    resumed = prepared(tmp_path, resume=True)
    uninterrupted = prepared(tmp_path, output=tmp_path / "o2", database=tmp_path / "n")
    for search in (resumed, uninterrupted):
        searched(search)
        write_results(search)
    for name in ("points.csv", "layers.csv"):
        assert (resumed.spec.output / name).read_text() == (uninterrupted.spec.output / name).read_text()


def test_a_second_search_builds_nothing(tmp_path) -> None:
    searched(prepared(tmp_path))
    other = prepared(tmp_path, output=tmp_path / "other", scores="parameters", seed=1)
    executor = searched(other)
    assert not executor.builds
    assert other.chosen is not None


def test_two_searches_at_once_share_the_work(tmp_path) -> None:
    a, b = prepared(tmp_path, jobs=2), prepared(tmp_path, jobs=2, output=tmp_path / "b")
    executors: dict[str, FakeExecutor] = {}
    errors: list[BaseException] = []

    def go(name: str, search) -> None:
        try:
            executors[name] = searched(search)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=go, args=(n, s)) for n, s in (("a", a), ("b", b))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not errors
    together = executors["a"].measured + executors["b"].measured
    assert set(together.values()) == {1}
    assert a.chosen is not None and b.chosen is not None
    assert a.chosen.label == b.chosen.label


class PageParser(HTMLParser):
    """Checks that tags nest, and collects what the page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.charts = 0

    def handle_starttag(self, tag, attrs) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag in ("link", "img", "iframe"):
            self.outside.append(tag)
        self.charts += ("class", "plotly-graph-div") in attrs
        self.outside += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_files(tmp_path) -> None:
    search = prepared(tmp_path, SPACE + "[constraints]\nparameters = [0, 230000]\n")
    searched(search)
    write_results(search)
    names = {"search.json", "results.json", "points.csv", "layers.csv", "report.html", "best.json"}
    assert {p.name for p in search.spec.output.iterdir()} == names
    results = json.loads((search.spec.output / "results.json").read_text())
    chosen = [r for r in results["points"] if r["chosen"]]
    assert len(chosen) == 1 and chosen[0]["front"] and chosen[0]["point"] == results["choice"]["point"]
    page = (search.spec.output / "report.html").read_text()
    parser = PageParser()
    parser.feed(page)
    assert parser.outside == []
    for heading in ("Choice", "Throughput against score", "Per-layer latency", "Prediction against measurement"):
        assert f"<h2>{heading}" in page
    for r in results["points"]:
        assert r["point"] in page
    assert parser.charts == 3  # the front, layers, predictions
    assert "default-src 'none'" in page and "<script>" in page  # plotly.js is in it, and nothing is fetched


def test_the_page_of_an_earlier_search_has_the_papers_figures(tmp_path, monkeypatch) -> None:
    """Known ones beside ours; without plotly the page has the tables, and says how to get charts."""
    results = json.loads((BENCHMARKS / "results/h100/search/results.json").read_text())
    monkeypatch.setattr(charts, "library", lambda: "")
    page = report(results)
    parser = PageParser()
    parser.feed(page)
    assert parser.charts == 4 and "Beside the paper" in page
    cells = re.findall(r"<td>(.*?)</td>", page.split("<td>96x256x12</td>")[1])
    assert cells[9:12] == ["2,955", "69.6", "34.8"]
    monkeypatch.setattr(charts, "plotly", lambda: None)
    page = report(results)
    parser = PageParser()
    parser.feed(page)
    assert parser.charts == 0 and "pip install 'jet-export[search]'" in page and "<td>96x256x12</td>" in page


def test_best_json_builds_at_once(tmp_path, monkeypatch) -> None:
    search = prepared(tmp_path, SPACE + '[attention]\nlayout = ["jsja"]\n', whole=0)
    searched(search)
    write_results(search)
    best = search.spec.output / "best.json"
    config = JetNemotronConfig.from_json_file(best)
    assert search.chosen is not None and search.chosen.config is not None
    assert config == search.chosen.config
    plan = make_plan(BuildOptions(model=str(best), device="cpu", random_weights=True, fp8=True))
    assert plan.config == config
    command = json.loads(best.read_text())["jet_export_search"]["build"]
    assert command.startswith(f"jet-export build --model {best} --random-weights")


def test_the_build_command_says_the_precision(tmp_path) -> None:
    space = SPACE + '[precision]\nfp8 = [true]\nstate_dtype = "bfloat16"\nkv_cache_dtype = "fp8"\n'
    search = prepared(tmp_path, space, dtype="bfloat16", whole=0)
    searched(search)
    assert search.chosen is not None
    words = build_command(search, search.chosen)
    assert "--fp8 --kv-cache-dtype fp8 --state-dtype bfloat16 --max-batch-size 4 --max-seq-len 320" in words
    assert "--dtype" not in words.replace("--state-dtype", "").replace("--kv-cache-dtype", "")


def test_nothing_is_created_where_every_point_is_refused(tmp_path) -> None:
    search = prepared(tmp_path, SPACE + "[constraints]\ncache_bytes = 1000\n")
    with pytest.raises(JetExportError, match=r"none of the 4 points can be built.*cache .* over 1\.0 KB") as e:
        run_search(search, lambda line: None)
    assert "space.toml" in str(e.value)
    assert not search.spec.output.exists() and not search.spec.database_file.exists()


def test_refused_points_are_not_built(tmp_path) -> None:
    space = SPACE.replace('"16x32x4"', '"16x32x4", "128x128x8", "24x32x2", "512x16x1"')
    search = prepared(tmp_path, space, whole=0)
    executor = searched(search)
    refused = {e.label.split()[0]: e.refused for e in search.state.evaluations.values() if e.refused}
    assert set(refused) == {"128x128x8", "24x32x2", "512x16x1"}
    assert re.search(r"cache .* a sequence at 256 tokens, .* % over", refused["128x128x8"] or "")
    assert "head_k_dim of the jet layers is 24" in (refused["24x32x2"] or "")
    assert "multiples of 16 up to 256" in (refused["512x16x1"] or "")
    assert len(executor.builds) == CELLS
    assert any(line.startswith("refused    128x128x8") for line in plan_lines(search))


@pytest.mark.parametrize(
    ("constraints", "reason"),
    [
        ("cache_bytes = 20000", r"cache .* over 20\.0 KB"),
        ("gpu_memory = 10000", r"needs .* at batch 4 and 256 tokens, the device has 10\.0 KB"),
        ("parameters = [1, 2]", r"parameters, outside 1 to 2"),
    ],
)
def test_a_refusal_names_the_bound(tmp_path, constraints: str, reason: str) -> None:
    search = prepared(tmp_path, SPACE + f"[constraints]\n{constraints}\n")
    lines = [line for line in plan_lines(search) if line.startswith("refused")]
    assert len(lines) == 4
    assert all(re.search(reason, line) for line in lines)


def test_a_missed_target_leaves_the_front(tmp_path) -> None:
    free = prepared(tmp_path)
    searched(free)
    speeds = sorted(e.tokens_per_s(4, 256) for e in free.state.evaluations.values())
    bound = (speeds[0] + speeds[-1]) / 2
    tight = prepared(tmp_path, SPACE + f"[constraints]\ntokens_per_s = {bound}\n", output=tmp_path / "tight")
    searched(tight)
    assert {e.missed is None for e in tight.state.evaluations.values()} == {False, True}
    for e in tight.state.evaluations.values():
        assert (e.missed is None) == (e.tokens_per_s(4, 256) >= bound)
        assert not (e.front and e.missed)
    none = prepared(tmp_path, SPACE + "[constraints]\ndecode_ms = 0.001\n", output=tmp_path / "none")
    with pytest.raises(JetExportError, match=r"no point is left: decode step .* ms, target 0\.001"):
        searched(none)


def test_a_target_that_a_whole_engine_misses_leaves_the_front(tmp_path) -> None:
    free = prepared(tmp_path, whole=0)
    searched(free)
    front = free.front
    assert len(front) > 1
    bound = f"[constraints]\ntokens_per_s = {0.9 * front[-1].tokens_per_s(4, 256)}\n"
    some = prepared(tmp_path, SPACE + bound, output=tmp_path / "some", whole=1)
    searched(some, whole=9.0)
    lost = [e for e in some.state.evaluations.values() if e.measured]
    assert len(lost) == 1 and not lost[0].front and not lost[0].chosen
    assert re.match(r"measured whole: [\d,]+ tokens/s, target", lost[0].missed or "")
    assert some.chosen is not None and "predicted from its layers" in some.state.reason
    every = prepared(tmp_path, SPACE + bound, output=tmp_path / "every", whole=9, database=tmp_path / "n.db")
    with pytest.raises(JetExportError, match=r"those predicted to meet the targets miss them: .*measured whole"):
        searched(every, whole=9.0)


def test_bf16_points_that_fp8_cannot_take_are_refused(tmp_path) -> None:
    space = SPACE.replace('"16x32x4"', '"16x48x1"')
    search = prepared(tmp_path, space, dtype="bfloat16", whole=0)
    reasons = [search.assess(p).refused for p in all_points(search.spec.space, search.spec.preset)]
    assert any("16x48x1 in FP8" in (r or "") and "not a multiple of 16" in (r or "") for r in reasons)


def test_timeout_keeps_what_is_measured(tmp_path) -> None:
    search = prepared(tmp_path, timeout=0)
    with pytest.raises(JetExportError, match=r"--timeout 0: no point is measured completely yet.*\n.*--resume"):
        searched(search)
    executor = searched(prepared(tmp_path, resume=True))
    assert sum(executor.builds.values()) > 0


def test_another_search_is_not_resumed(tmp_path) -> None:
    searched(prepared(tmp_path))
    with pytest.raises(JetExportError, match=r"holds another search \(space differ\)"):
        searched(prepared(tmp_path, SPACE.replace("batch = [1, 4]", "batch = [2, 4]"), resume=True))
    with pytest.raises(JetExportError, match=r"is not empty and holds no search"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").write_text("")
        searched(prepared(tmp_path, output=tmp_path / "mine"))


def test_an_occupied_output_is_refused_before_anything_is_created(tmp_path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("")
    for output in (taken, taken / "file", taken / "file" / "sub"):
        search = prepared(tmp_path, output=output, database=None)
        for work in (run_search, build_engines):
            with pytest.raises(JetExportError, match=r"--output .*(is not empty and holds no search|is no directory)"):
                work(search, print, SimpleNamespace(stop=lambda: None))
    assert [p.name for p in taken.iterdir()] == ["file"]
    assert {p.name for p in tmp_path.iterdir()} == {"taken", "mini.json", "space.toml"}


def test_a_record_that_is_not_a_table_is_another_search(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.json").write_text("[]")
    with pytest.raises(JetExportError, match="holds another search"):
        run_search(prepared(tmp_path, resume=True), print)


def test_options_out_of_range_are_named(tmp_path) -> None:
    for option, value in (("timeout", math.nan), ("timeout", -1.0), ("jobs", 0), ("trials", 0), ("whole", -1)):
        with pytest.raises(JetExportError, match=f"--{option} {value}: must be at least"):
            options: dict[str, Any] = {option: value}
            prepared(tmp_path, **options)


def strict(text: str) -> dict:
    return json.loads(text, parse_constant=pytest.fail)


def test_files_are_json(tmp_path) -> None:
    search = prepared(tmp_path, whole=1)
    searched(search)
    write_results(search)
    assert strict((search.spec.output / "search.json").read_text())["space"]["parameters"] == [0.0, None]
    assert strict((search.spec.output / "results.json").read_text())["space"]["parameters"] == [0.0, None]


@pytest.mark.parametrize("way", ["prefill", "synthetic"])
def test_how_states_were_filled_is_reported(tmp_path, way: str) -> None:
    search = prepared(tmp_path, whole=1)
    searched(search, filled_by=way)
    write_results(search)
    results = json.loads((search.spec.output / "results.json").read_text())
    assert {r["filled_by"] for r in results["layers"] + results["points"]} == {way}
    assert {r["whole_filled_by"] for r in results["points"]} == {way, None}
    for text in ("\n".join(summary_lines(search)), (search.spec.output / "report.html").read_text()):
        assert ("synthetic: states made of noise instead of prefilled" in text) == (way == "synthetic")


def test_a_predicted_spread_is_called_predicted(tmp_path) -> None:
    search = prepared(tmp_path, whole=0)
    searched(search)
    write_results(search)
    page = (search.spec.output / "report.html").read_text()
    assert "Throughput, predicted from single layers, differs by" in page and "measured points" not in page


def test_progress_says_how_long_is_left(tmp_path) -> None:
    lines: list[str] = []
    searched(prepared(tmp_path, whole=0), lines=lines)
    told = [line for line in lines if re.match(rf"  \[\d/{CELLS}\] ", line)]
    assert len(told) == CELLS
    assert all("decode" in line and "prefill" in line for line in told)
    assert all("s left" in line for line in told[:-1]) and "left" not in told[-1]


def selector(slack_percent: float) -> Selector:
    return Selector(batch=1, context=1, slack_percent=slack_percent)


POINT = Point(sizes=(), layout="", window_size=0, fp8=False, state_dtype="float32", kv_cache_dtype="auto")


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=12))
def test_no_point_beats_one_on_the_front(pairs: list[tuple[int, int]]) -> None:
    es = [
        Evaluation(point=POINT, label=str(i), score=float(s), predicted={(1, 1, "decode"): 1.0 / v})
        for i, (v, s) in enumerate(pairs)
    ]
    front = selector(0.0).pareto(es)

    def beaten(a: Evaluation, b: Evaluation) -> bool:
        va, vb, sa, sb = a.tokens_per_s(1, 1), b.tokens_per_s(1, 1), a.score, b.score
        assert va is not None and vb is not None and sa is not None and sb is not None
        return vb >= va and sb >= sa and (vb > va or sb > sa)

    assert all(not any(beaten(a, b) for b in es) for a in front)
    values = {(e.tokens_per_s(1, 1), e.score) for e in front}
    assert len(values) == len(front)
    for e in es:
        if not any(beaten(e, b) for b in es):
            assert (e.tokens_per_s(1, 1), e.score) in values


def test_the_choice_is_the_best_score_within_the_slack() -> None:
    def point(label: str, speed: float, score: float) -> Evaluation:
        return Evaluation(point=POINT, label=label, score=score, predicted={(1, 1, "decode"): 1e3 / speed})

    es = [point("fast", 100, 1), point("near", 98, 2), point("slow", 90, 3)]
    assert selector(3.0).choose(es)[0].label == "near"
    assert selector(0.0).choose(es)[0].label == "fast"
    assert selector(50.0).choose(es)[0].label == "slow"
    es[2].measured = {(1, 1, "decode"): 1e3 / 101}
    es[0].measured = {(1, 1, "decode"): 1e3 / 100}
    best, why = selector(0.0).choose(es)
    assert best.label == "slow" and "measured whole" in why


def test_only_points_measured_whole_count_as_such() -> None:
    def point(label: str, speed: float, score: float) -> Evaluation:
        return Evaluation(point=POINT, label=label, score=score, predicted={(1, 1, "decode"): 1e3 / speed})

    es = [point("fast", 1000, 1), point("near", 990, 2), point("slow", 900, 3)]
    es[1].measured = {(1, 1, "decode"): 1e3 / 980}
    best, why = selector(3.0).choose(es)
    assert best is es[1]
    assert why == (
        "the best score of the 2 of 3 points predicted within 3 % of the fastest (fast, 1,000 tokens/s); "
        "measured whole: 980 tokens/s"
    )
    es[0].measured = {(1, 1, "decode"): 1e3 / 2000}
    best, why = selector(3.0).choose(es)
    assert best is es[0]
    assert why == (
        "the best score of the 1 of 2 points that are within 3 % of the fastest (fast, 2,000 tokens/s), of "
        "those measured whole (2 of the 3 on the front); measured whole: 2,000 tokens/s"
    )


def test_noise_is_not_a_speed(tmp_path) -> None:
    e = Evaluation(point=POINT, label="x", predicted={(1, 1, "decode"): -1.0})
    assert math.isnan(e.tokens_per_s(1, 1))


def test_engines_of_build_only_are_measured_later(tmp_path) -> None:
    lines: list[str] = []
    first = prepared(tmp_path, jobs=3, whole=1)
    executor = FakeExecutor(Database(first.spec.database_file), first.spec.setup)
    build_engines(first, lines.append, executor)
    assert len(executor.builds) == CELLS + 1 and not executor.measured  # the best score's whole engine too
    assert "8 engines" in lines[-1] and not first.spec.output.exists()

    later = prepared(tmp_path, whole=2)
    again = searched(later)
    whole = [e for e in later.front if e.measured]
    assert later.front[-1] in whole and len(whole) == min(2, len(later.front))
    assert sum(again.builds.values()) == len(whole) - 1
    assert len(again.measured) == 4 * (CELLS + len(whole))
    assert not list(again.bundles.iterdir())


def test_what_is_built_is_measured_when_time_is_up(tmp_path) -> None:
    first = prepared(tmp_path, whole=1)
    build_engines(first, print, FakeExecutor(Database(first.spec.database_file), first.spec.setup))
    late = prepared(tmp_path, whole=3, timeout=0)
    executor = searched(late)
    assert not executor.builds and late.chosen is not None
    assert [e.measured is not None for e in late.front] == [False] * (len(late.front) - 1) + [True]


def test_build_only_refuses_a_sampled_space(tmp_path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(JetExportError, match="--build-only: the points of a sampled space"):
        build_engines(prepared(tmp_path, sampler="tpe", trials=3), print)
