"""Traces: the three formats, told by their headers, and what is said of other files."""

from pathlib import Path

import pytest

from jet_export.simulate.load import Arrival, Lengths, Poisson
from jet_export.simulate.trace import read_trace
from jet_export.utils.errors import JetExportError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_csv_of_arrivals(tmp_path: Path) -> None:
    text = "arrival,prompt,output,session\n12.5,7,3,a\n10,5,2,\n11,0,4,\n"  # out of order, and one without a prompt
    assert read_trace(write(tmp_path / "t.csv", text)) == [Arrival(0.0, 5, 2), Arrival(2.5, 7, 3, "a")]
    assert read_trace(tmp_path / "t.csv", 1) == [Arrival(0.0, 5, 2)]


def test_azure(tmp_path: Path) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    old = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    new = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.017335+00:00,2399,6\n"
    (first, second), (third, fourth) = (read_trace(write(tmp_path / "a.csv", head + rows)) for rows in (old, new))
    assert (first.at, first.prompt, first.output) == (0.0, 374, 44) and second.at == pytest.approx(4.314579, abs=1e-5)
    assert (third.at, fourth.prompt) == (0.0, 2399) and fourth.at == pytest.approx(1.007405, abs=1e-5)


def test_mooncake(tmp_path: Path) -> None:
    rows = (
        '{"timestamp": 27000, "input_length": 700, "output_length": 52, "hash_ids": [0, 1]}\n'
        '{"timestamp": 30000, "input_length": 1030, "output_length": 26, "hash_ids": [0, 9, 10]}\n'
    )
    first, second = read_trace(write(tmp_path / "m.jsonl", rows))
    assert first == Arrival(0.0, 700, 52, "", (0, 1)) and second == Arrival(3.0, 1030, 26, "", (0, 9, 10))


@pytest.mark.parametrize(
    "text, said",
    [
        ("time,tokens\n1,2\n", r"none of a known format \(time, tokens\)"),
        ("arrival,prompt,output\n1,x,3\n", "line 2: ValueError"),
        ('{"timestamp": 1}\n', "line 1: KeyError: 'input_length'"),
        ('{"timestamp"\n', "line 1: not JSON"),
        ("arrival,prompt,output\n", "holds no request"),
    ],
)
def test_other_files_are_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(JetExportError, match=said):
        read_trace(write(tmp_path / "t", text))
    with pytest.raises(JetExportError, match="no such file"):
        read_trace(tmp_path / "none")


def test_poisson_has_the_rate_the_lengths_and_the_sessions_asked_for() -> None:
    poisson = Poisson(rate=50.0, requests=4000, prompt=Lengths(mean=300), output=Lengths(mean=40, sigma=0), seed=3)
    load = poisson.draw()
    assert load == poisson.draw() and len(load) == 4000
    assert load[-1].at == pytest.approx(80, rel=0.1)
    assert sum(a.prompt for a in load) / 4000 == pytest.approx(300, rel=0.05) and {a.output for a in load} == {40}
    turns = Poisson(
        rate=1.0, requests=30, turns=3, prompt=Lengths(mean=10, sigma=0), output=Lengths(mean=5, sigma=0)
    ).draw()
    of_one = [a.prompt for a in turns if a.session == "s0"]
    assert of_one == [10, 25, 40]  # each with the prompts and answers before
    with pytest.raises(JetExportError, match="rate of 0"):
        Poisson(rate=0, requests=1, prompt=Lengths(mean=1), output=Lengths(mean=1)).draw()
