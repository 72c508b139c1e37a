"""Which replica gets a request: sessions and prefixes stay, unless their replica has too much to do."""

import pytest

from jet_export.runtime.routing import Router
from jet_export.utils.errors import JetExportError


def test_the_least_loaded_gets_what_nobody_knows() -> None:
    router: Router[str] = Router()
    assert router.choose({"a": 2, "b": 1, "c": 1}) == "b"
    assert router.choose({"a": 0, "b": 1}, "s", [b"1"]) == "a"


def test_a_session_and_the_longest_prefix_stay() -> None:
    router: Router[str] = Router(slack=4)
    assert router.choose({"a": 0, "b": 1}, prefixes=[b"1", b"2"]) == "a"
    assert router.choose({"a": 3, "b": 0}, prefixes=[b"1", b"2", b"3"]) == "a"
    assert router.choose({"a": 4, "b": 0}, prefixes=[b"1", b"2", b"4"]) == "b"  # it has too much to do
    assert router.choose({"a": 1, "b": 2}, prefixes=[b"1", b"2", b"4", b"5"]) == "b"  # which holds more of it
    assert router.choose({"a": 1, "b": 0}, prefixes=[b"1", b"2", b"3"]) == "a"
    assert router.choose({"a": 1, "b": 0}, "session") == "b" == router.choose({"a": 0, "b": 3}, "session")


def test_what_is_gone_is_forgotten() -> None:
    router: Router[str] = Router()
    router.choose({"a": 0, "b": 1}, "s", [b"1"])
    assert router.choose({"b": 5, "c": 0}, "s", [b"1"]) == "c"  # a takes no requests
    router.choose({"a": 0, "b": 1}, "t", [b"2"])
    router.forget("a")
    assert router.choose({"a": 1, "b": 0}, "t", [b"2"]) == "b"
    small: Router[str] = Router(remembered=2)
    for prefix in (b"1", b"2", b"3"):
        small.choose({"a": 0, "b": 1}, prefixes=[prefix])
    assert set(small.prefixes) == {b"2", b"3"}


def test_policies() -> None:
    turns: Router[str] = Router("round-robin")
    assert sorted(turns.choose({"a": 0, "b": 9, "c": 3}) for _ in range(3)) == ["a", "b", "c"]
    least: Router[str] = Router("least")
    least.choose({"a": 0, "b": 1}, "s", [b"1"])
    assert least.choose({"a": 2, "b": 1}, "s", [b"1"]) == "b"
    with pytest.raises(JetExportError, match="router 'best' is not known"):
        Router("best")
