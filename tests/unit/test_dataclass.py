"""Our `dataclass` makes what the library's does."""

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field, replace
from typing import Any, ClassVar

import pytest

from qrun.formats.dataclass import dataclass as ours

Make = Callable[..., Callable[[type], Any]]


@pytest.fixture(params=[ours, dataclasses.dataclass], ids=["ours", "the library's"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


class Plain:
    """Two that are needed, one with a default, one that is made."""

    a: int
    b: list[int] = field(compare=False)
    c: str = "c"
    d: list[int] = field(default_factory=list, repr=False)
    shared: ClassVar[int] = 7


def of(make: Make, **options: bool) -> Any:
    return make(**options)(type("Plain", (Plain,), dict(vars(Plain))))


def test_fields_are_given_by_place_or_by_name(make: Make) -> None:
    made = of(make)
    assert vars(made(1, [2])) == {"a": 1, "b": [2], "c": "c", "d": []}
    assert list(vars(made(d=[1], b=[], a=0))) == ["a", "b", "c", "d"]
    assert vars(made(1, b=[2], c="x")) == {"a": 1, "b": [2], "c": "x", "d": []}
    assert made(1, []).d is not made(1, []).d
    for args, given in (((1,), {}), ((1, [], "", [], 5), {}), ((1, []), {"e": 1}), ((1, []), {"a": 1})):
        with pytest.raises(TypeError):
            made(*args, **given)


def test_equality_and_hashes(make: Make) -> None:
    made = of(make)
    assert made(1, [2]) == made(1, [3]) != made(2, [2]) and made(1, []) != (1, [], "c", [])
    with pytest.raises(TypeError, match="unhashable"):
        hash(made(1, []))
    frozen = make(frozen=True)(type("Frozen", (), {"__annotations__": {"a": int}, "__doc__": "One."}))
    assert {frozen(1): 2}[frozen(1)] == 2
    by_identity = of(make, eq=False)
    one = by_identity(1, [])
    assert one != by_identity(1, []) and {one: 1}[one] == 1


def test_frozen_ones_do_not_change(make: Make) -> None:
    frozen = of(make, frozen=True)(1, [])
    for change in (lambda: setattr(frozen, "a", 2), lambda: delattr(frozen, "a")):
        with pytest.raises(FrozenInstanceError):
            change()
    other = replace(frozen, a=2)
    assert (other.a, other.c, frozen.a) == (2, "c", 1)
    assert vars(copy.copy(other)) == vars(other)
    of(make)(1, []).a = 2


def test_it_is_shown_and_asked_for_fields(make: Make) -> None:
    made = of(make)(1, [2])
    assert repr(made) == "Plain(a=1, b=[2], c='c')"
    assert dataclasses.is_dataclass(made) and [each.name for each in dataclasses.fields(made)] == ["a", "b", "c", "d"]
    assert dataclasses.asdict(made) == {"a": 1, "b": [2], "c": "c", "d": []}


def test_subclasses_add_fields_and_what_is_written_out_stays(make: Make) -> None:
    base = of(make)

    def after(self: Any) -> None:
        self.c = self.c.upper()

    below = make()(
        type("Below", (base,), {"__annotations__": {"e": int}, "e": 5, "__doc__": "More.", "__post_init__": after,
                                "__repr__": lambda self: "mine"})
    )  # fmt: skip
    assert vars(below(1, [])) == {"a": 1, "b": [], "c": "C", "d": [], "e": 5}
    assert repr(below(1, [])) == "mine" and below(1, []) != base(1, [])


def test_subclasses_of_frozen_ones(make: Make) -> None:
    base = make(frozen=True)(type("Base", (), {"__annotations__": {"a": int}, "__doc__": "One."}))
    body = {"__annotations__": {"b": int}, "b": 1, "__doc__": "Two."}
    below = make(frozen=True)(type("Below", (base,), dict(body)))
    assert vars(below(1)) == {"a": 1, "b": 1} and below(1) == below(1, 1) and hash(below(1)) == hash(below(1))
    for name in ("a", "b"):
        with pytest.raises(FrozenInstanceError):
            setattr(below(1), name, 2)
    with pytest.raises(TypeError, match="frozen"):
        make()(type("Loose", (base,), dict(body)))
    with pytest.raises(TypeError, match="frozen"):
        make(frozen=True)(type("Tight", (make()(type("Open", (), dict(body))),), dict(body)))
    plain = type("PlainBelow", (base,), {})(1)
    plain.own = 2  # no field
    del plain.own
    with pytest.raises(FrozenInstanceError):
        plain.a = 2


def test_what_a_class_is_called_with(make: Make) -> None:
    made = of(make)
    parameters = inspect.signature(made).parameters
    assert list(parameters) == ["a", "b", "c", "d"] and parameters["c"].default == "c"
    assert parameters["a"].annotation is int and parameters["a"].default is inspect.Parameter.empty
    other = type("Other", (made,), {"__init__": lambda self, x: None})
    assert list(inspect.signature(other).parameters) == ["x"]


def test_one_that_has_itself_is_shown_and_one_with_an_eq_has_a_hash(make: Make) -> None:
    one = of(make)(1, [])
    one.c = one
    assert repr(one) == "Plain(a=1, b=[], c=...)"
    body = {"__annotations__": {"a": int}, "__doc__": "One.", "__eq__": lambda self, other: True, "__hash__": None}
    assert hash(make(frozen=True)(type("Alike", (), body))(1)) == hash((1,))


@ours(frozen=True)
class Sent:
    """At the top of a module, as pickle needs it."""

    a: int


def test_they_can_be_sent() -> None:
    assert pickle.loads(pickle.dumps(Sent(3))) == Sent(3)
