"""An array's name is declared in every buffer that uses it, however short-lived buffers are."""

from itertools import count

import pytest
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.utils import IndentedBuffer
from torch.utils._ordered_set import OrderedSet

from jet_export.backends.inductor.workarounds import lasting_names


def by_method(self, int_array, writeline, known_statically=False, graph=None):
    """Caches names as torch 2.11 does."""
    key, names = (int_array, id(writeline), known_statically, id(graph)), self.codegen_int_array_var_cache
    if key not in names:
        names[key] = self._codegen_int_array_var_impl(int_array, writeline, known_statically)
    return names[key]


@pytest.fixture(params=["torch's own", "torch 2.11's"])
def torchs(request, monkeypatch) -> None:
    if request.param == "torch 2.11's":
        monkeypatch.setattr(CppWrapperCpu, "codegen_int_array_var", by_method)


def generator() -> CppWrapperCpu:
    """The parts of a code generator that name arrays."""
    wrapper = CppWrapperCpu.__new__(CppWrapperCpu)
    wrapper.int_array_id, wrapper.declared_int_array_vars = count(), OrderedSet()
    wrapper.codegen_int_array_var_cache = {}
    return wrapper


def undeclared(wrapper: CppWrapperCpu, buffers: int = 200) -> int:
    """How many of these short-lived buffers lack the declaration of a name that they use."""
    found = 0
    for _ in range(buffers):
        buffer = IndentedBuffer()
        for array in ("{2L, 3L}", "{5L}"):
            name = wrapper.codegen_int_array_var(array, buffer.writeline, known_statically=True)
            found += name not in buffer.getvalue()
        del buffer
    return found


def test_every_name_is_declared_where_it_is_used(torchs) -> None:
    with lasting_names():
        assert undeclared(generator()) == 0


def test_a_long_lived_buffer_declares_an_array_once(torchs) -> None:
    with lasting_names():
        wrapper, buffer = generator(), IndentedBuffer()
        names = {wrapper.codegen_int_array_var("{2L, 3L}", buffer.writeline, True) for _ in range(5)}
    assert len(names) == 1 and buffer.getvalue().count("int_array_") == 1


def test_torch_is_unchanged_afterwards() -> None:
    before = CppWrapperCpu.codegen_int_array_var
    with pytest.raises(ValueError), lasting_names():
        assert CppWrapperCpu.codegen_int_array_var is not before
        raise ValueError
    assert CppWrapperCpu.codegen_int_array_var is before


def test_these_buffers_show_the_fault_without_the_workaround(monkeypatch) -> None:
    monkeypatch.setattr(CppWrapperCpu, "codegen_int_array_var", by_method)
    assert undeclared(generator()) > 0
