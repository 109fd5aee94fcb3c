"""Stop strings: nothing of them gets through, whatever the pieces."""

from hypothesis import given
from hypothesis import strategies as st

from qrun.engine.text.stop_strings import StopStrings


def filtered(pieces: list[str], strings: tuple[str, ...]) -> tuple[str, str | None]:
    stops = StopStrings(strings)
    shown = "".join(stops.push(piece) for piece in pieces)
    return shown + ("" if stops.found else stops.flush()), stops.found


def test_text_is_held_back_while_it_may_become_a_stop_string() -> None:
    stops = StopStrings(("END", "\n\n"))
    assert [stops.push(text) for text in ["a", "E", "N", "d\n", "b", "xEN"]] == ["a", "", "", "ENd", "\nb", "x"]
    assert stops.flush() == "EN"
    assert stops.found is None


def test_nothing_follows_a_stop_string() -> None:
    stops = StopStrings(("END",))
    assert [stops.push(text) for text in ["aEN", "Dmore", "more"]] == ["a", "", ""]
    assert (stops.found, stops.flush()) == ("END", "")


def test_a_beginning_that_comes_to_nothing_may_hold_another() -> None:
    assert filtered(list("aab aac"), ("aac",)) == ("aab ", "aac")
    assert filtered(list("aaaab"), ("aaab",)) == ("a", "aaab")


def test_the_first_to_be_complete_ends_the_text() -> None:
    assert filtered(["xabcdy"], ("abcd", "bc")) == ("xa", "bc")
    assert filtered(["xabcdy"], ("abcd", "cd")) == ("x", "abcd")


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopStrings(()).push("END") == "END"


@given(
    st.lists(st.text("ab\n", max_size=5), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_the_outcome_is_that_of_the_whole_text(pieces: list[str], strings: tuple[str, ...]) -> None:
    text = "".join(pieces)
    ends = [(end, end - len(s), s) for s in strings for end in range(len(text) + 1) if text[:end].endswith(s)]
    expected = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
    assert filtered(pieces, strings) == expected
