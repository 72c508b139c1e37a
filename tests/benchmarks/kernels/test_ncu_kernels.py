"""benchmarks/kernels/ncu_kernels.py: reading what Nsight Compute prints."""

import pytest
from helpers.scripts import load_script

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
HEADER = [
    "ID",
    "Kernel Name",
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "launch__registers_per_thread",
    STALL.format("barrier"),
    STALL.format("long_scoreboard"),
    STALL.format("wait"),
]


@pytest.fixture(scope="module")
def script():
    return load_script("kernels/ncu_kernels.py")


def line(*values: object) -> str:
    return ",".join(f'"{v}"' for v in values)


def test_units_and_the_largest_stalls_first(script) -> None:
    text = "\n".join(
        [
            "==PROF== Connected",
            line(*HEADER),
            line("", "", "ns", "Mbyte", "register/thread", "", "", ""),
            line(0, "decode_kernel(float*, int)", "12,500", "268.5", 128, "0.5", "7.25", "1,000.5"),
            line(1, "chunk_scan_kernel", "2000", "1", 254, "", "3", "1"),
        ]
    )
    decode, scan = script.parse(text)
    assert decode["kernel"] == "decode_kernel" and decode["us"] == 12.5 and decode["dram_bytes"] == 268.5e6
    assert list(decode["stalls"]) == ["wait", "long_scoreboard", "barrier"] and decode["stalls"]["wait"] == 1000.5
    assert scan["us"] == 2.0 and "barrier" not in scan["stalls"]


def test_output_without_kernels_is_noticed(script) -> None:
    assert script.parse("==ERROR== the driver refused access to the counters") == []
