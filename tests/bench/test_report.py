"""Tables, notes and CSV of measured rows."""

import csv

from helpers.bench_rows import row

from jet_export.bench.protocols import Skipped
from jet_export.bench.report import footnotes, milliseconds, skipped_lines, table, write_csv


def test_csv_has_every_figure(tmp_path) -> None:
    write_csv(tmp_path / "x.csv", [row(1, 100.5), row(2, 3)])
    with open(tmp_path / "x.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows[0]["decode_tokens_per_s"] == "100.5" and rows[0]["step_bytes_total"] == "9" and rows[1]["batch"] == "2"


def test_notes_name_synthetic_states_and_meaningless_text() -> None:
    plain = " ".join(footnotes([row(1, 1, ttft_samples=1000)]))
    assert not plain
    notes = " ".join(footnotes([row(1, 1, filled_by="synthetic", throughput_only=True)]))
    assert "throughput only" in notes and "states made of noise" in notes and "p99 is the largest" in notes


def test_skipped_cases_that_one_build_allows_share_a_line() -> None:
    cases = [Skipped(context=4096, batch=b, chunk=256, reason="too long", remedy="jet-export build") for b in (1, 8)]
    assert skipped_lines(cases) == ["skipped: context 4096, batch 1, 8, chunk 256: too long\n  jet-export build"]


def test_table_marks_contexts_beyond_the_positions() -> None:
    t = table([row(1, 5, throughput_only=True), row(1, 5)])
    assert list(t.columns[1].cells) == ["4096*", "4096"]


def spaced(batch: int, decode: float):
    step = {"weights": 5, "total": 6}
    return row(batch, decode, state_interval=8, decode_of_interval_roofline=0.5, interval_step_bytes=step)


def test_rows_of_states_written_every_few_tokens_have_the_shares_of_both_rooflines(tmp_path) -> None:
    headers = [str(c.header) for c in table([row(1, 5)]).columns]
    assert "of roof/L" not in headers and not footnotes([row(1, 5, ttft_samples=1000)])
    columns = {str(c.header): list(c.cells) for c in table([spaced(1, 5), row(1, 5)]).columns}
    assert columns["of roof/L"] == ["50%", "–"] and columns["of roof"] == ["80%", "80%"]
    assert "written every 8 tokens (L)" in " ".join(footnotes([spaced(1, 5), row(1, 5)]))
    write_csv(tmp_path / "x.csv", [row(2, 3), spaced(1, 5)])
    with open(tmp_path / "x.csv", newline="") as f:
        first, second = csv.DictReader(f)
    assert first["interval_step_bytes_total"] == "" and second["interval_step_bytes_total"] == "6"
    assert (first["state_interval"], second["decode_of_interval_roofline"]) == ("1", "0.5")


def test_milliseconds() -> None:
    assert [milliseconds(x) for x in (None, 1.234, 1234.0)] == ["–", "1.23 ms", "1.23 s"]
