"""Tracing of launchers, the choice of stages, and where headers and compilers come from."""

import json
import re
import zipfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.plugin_nodes import JET_TINY

from jet_export.model.config import JetNemotronConfig
from jet_export.plugins import compile_kernels, headers, library
from jet_export.plugins.cases import (
    AttentionCase,
    JetBlockCase,
    case_from_dict,
    case_to_dict,
    label,
    model_cases,
)
from jet_export.plugins.kernel import Kernel
from jet_export.plugins.symbolic import Scalar, Shape, Size, Trace
from jet_export.utils.compiler import find_compiler
from jet_export.utils.errors import JetExportError


def test_sizes_become_expressions():
    T, N = Size("T"), Size("N")
    assert ((T * 2) // 64 + N).code == "(((T * 2) / 64) + N)"
    assert torch.sym_max(1, torch.sym_min(8 * N // T, 16)).code == (
        "std::max<int64_t>(1, std::min<int64_t>(((8 * N) / T), 16))"
    )
    assert (1 * T).code == "T" and (0.5 * Scalar("s")).code == "(s * 0.5)"


def test_a_launcher_that_branches_on_a_size_is_refused():
    T = Size("p.T")
    for branch in (lambda: max(T, 1), lambda: bool(T), lambda: T == 3, lambda: T != 3, lambda: T <= 3):
        with pytest.raises(TypeError, match=r"branched on the size p.T"):
            branch()


def test_an_argument_that_its_value_would_specialise_is_refused():
    trace = Trace()
    parameter = SimpleNamespace(is_constexpr=False, do_not_specialize=False)
    kernel = SimpleNamespace(__name__="a_kernel", arg_names=["stride"], params=[parameter])
    for value, message in ((Size("p.T"), "stride = p.T would be specialised"), (1, "which Triton makes a constant")):
        with pytest.raises(TypeError, match=message):
            trace.record(kernel, (1,), (value,), {})


def test_strides_of_stand_ins_are_those_of_tensors():
    shape = Shape("x", (3, 4, 5), torch.float32, Trace())
    assert shape.stride() == torch.empty(3, 4, 5).stride() and shape.stride(1) == 5
    assert Shape("x", (Size("T"), Size("C")), torch.float32, Trace()).stride(0).code == "C"


def test_cases_of_a_model_are_its_layers():
    config = JetNemotronConfig.from_json_file(JET_TINY)
    cases = model_cases(config, cache_dtype="float8_e4m3fn")
    assert cases == [
        JetBlockCase(4, 64, 64, 4, "bfloat16", "float32"),
        AttentionCase(4, 2, 64, 128, 128, "bfloat16", "float8_e4m3fn"),
        AttentionCase(4, 2, 64, 128, 0, "bfloat16", "float8_e4m3fn"),
    ]
    assert [case_from_dict(json.loads(json.dumps(case_to_dict(c)))) for c in cases] == cases


KERNEL = Kernel(
    "a_kernel",
    (("x", "*bf16"), ("STAGES", "constexpr")),
    (("STAGES", 2),),
    ("x",),
    (("num_warps", 4), ("num_stages", 3)),
)


def compiled_with(shared_of: Any, scratch: int = 0) -> Any:
    """A stand-in for triton.compile: shared memory by (STAGES, num_stages)."""

    def compile_variant(function: Any, kernel: Kernel, sm: int) -> Any:
        shared = shared_of(dict(kernel.constexprs)["STAGES"], dict(kernel.options)["num_stages"])
        meta = SimpleNamespace(shared=shared, global_scratch_size=scratch, profile_scratch_size=0, num_warps=4)
        return SimpleNamespace(metadata=meta, asm={"cubin": b""})

    return compile_variant


def test_fewer_stages_where_shared_memory_is_small(monkeypatch):
    monkeypatch.setattr(compile_kernels, "compile_variant", compiled_with(lambda s, n: (s + n) * 24 << 10))
    monkeypatch.setattr(compile_kernels, "check_layout", lambda kernel, cubin: None)
    images = [compile_kernels.compile_image(None, KERNEL, sm) for sm in (90, 80, 89)]
    assert [(i.fewer_stages, i.shared >> 10) for i in images] == [(0, 120), (0, 120), (1, 96)]


def test_a_kernel_that_fits_in_no_way_names_itself_and_the_sm(monkeypatch):
    monkeypatch.setattr(compile_kernels, "compile_variant", compiled_with(lambda s, n: 100 << 10))
    with pytest.raises(JetExportError, match=r"a_kernel\(STAGES=2.* needs 102400 bytes .* SM 8.9 has 101376"):
        compile_kernels.compile_image(None, KERNEL, 89)


def test_scratch_and_unknown_sms_are_refused(monkeypatch):
    monkeypatch.setattr(compile_kernels, "compile_variant", compiled_with(lambda s, n: 0, scratch=8))
    with pytest.raises(JetExportError, match=r"a_kernel on SM 9.0 wants scratch memory"):
        compile_kernels.compile_image(None, KERNEL, 90)
    with pytest.raises(JetExportError, match=r"SM 7.0: its shared memory is not known"):
        compile_kernels.compile_image(None, KERNEL, 70)


def test_fp8_before_ada_is_refused(headers, tmp_path):
    case = AttentionCase(4, 2, 32, 16, 0, "bfloat16", "float8_e4m3fn")
    with pytest.raises(JetExportError, match=r"SM 8.0 has no FP8, which needs 8.9 or later.\nUse a cache in"):
        library.build_library([case], [80], headers, cache=tmp_path)
    assert not list(tmp_path.iterdir())  # nothing half-built stays


def test_headers_are_looked_for_in_order(monkeypatch, tmp_path):
    monkeypatch.setenv("JET_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "installed_headers", lambda: None)
    with pytest.raises(JetExportError, match=r"headers were not found.*\n.*--tensorrt-headers DIR.*--fetch-headers"):
        headers.find_headers()
    with pytest.raises(JetExportError, match=r"holds no NvInferRuntime.h"):
        headers.find_headers(tmp_path)
    for folder in (headers.fetched_headers(), tmp_path / "installed", tmp_path / "given"):
        folder.mkdir(parents=True)
        (folder / "NvInferRuntime.h").touch()
    assert headers.find_headers() == headers.fetched_headers()
    monkeypatch.setattr(headers, "installed_headers", lambda: tmp_path / "installed")
    assert headers.find_headers() == tmp_path / "installed"
    assert headers.find_headers(tmp_path / "given") == tmp_path / "given"


def test_an_installed_tensorrt_is_found(monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include/NvInferRuntime.h").touch()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    assert headers.installed_headers() == tmp_path / "include"


def test_an_altered_wheel_is_refused(tmp_path, monkeypatch):
    wheel = tmp_path / headers.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(headers.INSIDE + "NvInferRuntime.h", "// other")
    with pytest.raises(JetExportError, match="is not the pinned"):
        headers.unpack(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(JetExportError, match=r"no-such-compiler is not on the PATH, and the plugin .*\nInstall g\+\+"):
        find_compiler(library.PURPOSE)


def test_the_library_is_cached(mini, monkeypatch):
    monkeypatch.setattr(library, "compile_kernels", lambda *args: pytest.fail("compiled again"))
    include = headers.find_headers()
    assert library.build_library(mini.cases, mini.sms, include) == mini.folder
    spec, compiler = json.dumps([]), find_compiler(library.PURPOSE)
    names = {library.digest(s, include, compiler) for s in (spec, spec + " ")}
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    assert library.digest(spec, include, compiler) not in names and len(names) == 2


def test_the_table_is_readable(mini):
    text = (mini.folder / "kernels.inc").read_text().split("alignas(64)")[0]
    options = "OFF_U=128, D=96, W=4, ROWS=3, BT=16, BD=64, MIXED=True, STATIC=False, num_warps=4"
    assert f"// 0: dynamic_conv_kernel({options})" in text
    assert "// SM, shared memory, threads, cluster size, cubin" in text
    assert "// chunk_scan_kernel(q_in, k_n, solve, attn, decays, keep, v, o, recurrent_state," in text
    assert len(text) < 20_000


def test_the_table_for_people_agrees_with_the_cubins(mini):
    """Every kernel and SM of kernels.json is a cell of kernels.md, and every launch of kernels.inc a number there."""
    kernels = json.loads((mini.folder / "kernels.json").read_text())
    lines = (mini.folder / "kernels.md").read_text().splitlines()
    assert "| | kernel | configuration | SM 8.9 | SM 9.0 |" in lines
    for i, kernel in enumerate(kernels):
        (row,) = [line for line in lines if line.startswith(f"| {i} | {kernel['name']} | ")]
        for name, value in (*kernel["constexprs"], *kernel["options"]):
            assert f"{name} {value}" in row
        cells = row.strip("| ").split(" | ")[3:]
        for cell, image in zip(cells, sorted(kernel["images"], key=lambda image: image["sm"]), strict=True):
            assert cell.startswith(f"{image['shared'] / 1024:.1f} KB, {image['threads'] // 32} warps")
            assert ("fewer" in cell) == bool(image["fewer_stages"])
    text = (mini.folder / "kernels.inc").read_text()
    for n, case in enumerate(mini.cases):
        launched = [
            re.findall(r"p.launch\(kernels\[(\d+)\]", text.split(f"void case_{n}_{form}(")[1].split("\n}")[0])
            for form in ("mixed", "decode")
        ]
        assert f"| {label(case)} | {' | '.join(', '.join(found) for found in launched)} |" in lines
