"""The table of kernels: rooflines and comparisons, from given times."""

import json
from dataclasses import replace

import pytest
from helpers.scripts import load_script

from jet_export.bench.timer import Timing


@pytest.fixture(scope="module")
def kt():
    return load_script("kernels/kernels_table.py")


def rows(kt) -> list:
    case = ("attention decode", "2b", "B64 65536", "bf16")
    work = (3e9, 1e9, 3e12, 7e14)
    return [
        kt.row(*case, "jet", Timing(2.0, 3.0), *work),
        kt.row(*case, "flashinfer", Timing(4.0, 5.0), *work),
        kt.row(*case, "fla 0.6.0", Timing(1.0, 1.0), 0, 0, 3e12, 7e14, "less work", same_work=False),
    ]


def test_the_share_is_of_the_slower_of_bytes_and_operations(kt) -> None:
    memory = kt.row("k", "m", "s", "d", "jet", Timing(2.0, 3.0), 3e9, 1e9, 3e12, 7e14)
    assert memory.share == pytest.approx(0.5) and memory.roofline == "copy"
    assert memory.gb_s == pytest.approx(1500) and memory.tflop_s == pytest.approx(0.5)
    compute = kt.row("k", "m", "s", "d", "jet", Timing(2.0, 3.0), 3e6, 7e11, 3e12, 7e14)
    assert compute.share == pytest.approx(0.5) and compute.roofline == "matmul"


def test_other_work_has_no_share_of_ours(kt) -> None:
    assert rows(kt)[2].share is None and rows(kt)[2].gb_s is None


def test_others_stand_beside_ours(kt) -> None:
    columns = [list(c.cells) for c in kt.table(rows(kt)).columns]
    assert columns[10] == ["", "2.00x", "0.50x"] and columns[9] == ["50% copy", "25% copy", "–"]


def test_a_result_can_be_read_and_drawn_again(kt, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    environment = {"gpu": "H100", "torch": "2", "triton": "3", "date": "d", "commit": "c"}
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"environment": environment, "rows": kt.to_dicts(rows(kt))}))
    again, where = kt.read(file)
    assert again == rows(kt)
    written = kt.draw(tmp_path / "k.png", [*again, replace(again[0], kernel="jet_block", model="4b")], where)
    assert [path.name for path in written] == ["k-attention-decode.png", "k-jet_block.png"]  # one an op
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
