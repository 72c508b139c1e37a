"""StopText: the text before the first stop string, and nothing after it."""

from hypothesis import given
from hypothesis import strategies as st

from jet_export.runtime.tokenizer import ByteTokenizer, StopText, TextStream


class Utf8(ByteTokenizer):
    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def run(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    cut = StopText(Utf8(), stop)
    parts = []
    for byte in text.encode():
        part, stopped = cut.push(byte)
        parts.append(part)
        if stopped:
            return parts, True
    part, stopped = cut.flush()
    return [*parts, part], stopped


few = st.text("abé", max_size=12)


@given(few, st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_stop_string_that_completes_first(text: str, stop: list[str]) -> None:
    parts, stopped = run(text, tuple(stop))
    ends = [text.index(s) + len(s) for s in stop if s in text]
    if not ends:
        assert ("".join(parts), stopped) == (text, False)
        return
    end = min(ends)
    begin = min(text[:end].index(s) for s in stop if s in text[:end])
    assert ("".join(parts), stopped) == (text[:begin], True)


@given(few)
def test_without_stop_strings_nothing_is_held_back(text: str) -> None:
    parts, _ = run(text, ())
    assert [p for p in parts if p] == list(text)


def test_only_the_possible_start_of_a_stop_string_is_held_back() -> None:
    parts, _ = run("a<b<e", ("<end>",))
    assert parts == ["a", "", "<b", "", "", "<e"]


def test_invalid_utf8_does_not_hold_text_back_for_ever() -> None:
    stream = TextStream(Utf8())
    out = [stream.push(0xFF) for _ in range(40)]
    assert "".join(out) + stream.flush() == "�" * 40
    assert any(out)
