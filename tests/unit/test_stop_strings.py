"""Stop strings: what gets through, and which of them ends a text."""

import random
import time

from qrun.engine.text.stop_strings import StopStrings


def cut(text: str, strings: list[str]) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, and of those the one that began first; and which it is."""
    hits = [(at + len(one), at, one) for one in strings if (at := text.find(one)) >= 0]
    if not hits:
        return text, None
    _, at, found = min(hits)
    return text[:at], found


def test_random_texts_end_where_they_should_however_they_come() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        strings = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 4))]
        text = "".join(draw.choices("abc", k=draw.randint(0, 20)))
        stop, shown, rest = StopStrings(tuple(strings)), "", text
        while rest and stop.found is None:
            n = draw.randint(1, 4)
            shown += stop.push(rest[:n])
            rest = rest[n:]
            wanted, _ = cut(text, strings)
            assert wanted.startswith(shown)
        shown += stop.flush()
        assert (shown, stop.found) == cut(text, strings)


def test_no_more_is_held_back_than_may_become_one() -> None:
    stop = StopStrings(("END", "ENEMY", "."))
    assert [stop.push(piece) for piece in ("a", "xE", "N", "E", "x")] == ["a", "x", "", "", "ENEx"]
    assert stop.push("E.") == "E" and stop.found == "." and stop.push("x") == ""


def test_very_many_take_no_longer() -> None:
    """A step of all generations waits for each."""
    stop = StopStrings(tuple(f"zz{i}" for i in range(20_000)))
    begin = time.thread_time()
    assert "".join(stop.push("zz hello ") for _ in range(100)).startswith("zz hello zz")
    assert time.thread_time() - begin < 0.2
    assert stop.push("zz19999") == "" and stop.found == "zz1"


def test_a_long_one_takes_no_longer() -> None:
    stop = StopStrings(("a" * 100_000,))
    begin = time.thread_time()
    assert all(stop.push("aaaa") == "" for _ in range(500)) and stop.push("b") == "a" * 2000 + "b"
    assert time.thread_time() - begin < 1
