"""`dataclasses.dataclass` for classes that every start of the program makes.

The library's compiles four to seven methods for each class, which takes half a millisecond; here a hundred classes have
theirs from closures, and what is left takes a twentieth of that. Objects take longer to make, by a microsecond or two.
Fields, equality, hashes, `replace` and the rest are as they are there.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    import dataclasses

    def dataclass(cls: type | None = None, /, *, frozen: bool = False, eq: bool = True) -> Any:
        """As in the library, with so many of its options."""
        if cls is None:
            return lambda made: dataclass(made, frozen=frozen, eq=eq)
        dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
        cls.__dataclass_params__.frozen = frozen
        cls.__dataclass_params__.eq = eq
        fields = dataclasses.fields(cls)
        methods = {"__init__": _init(cls, fields), "__repr__": _repr([field.name for field in fields if field.repr])}
        if eq:
            compared = [field.name for field in fields if field.compare]
            methods |= {"__eq__": _eq(compared), "__hash__": _hash(compared) if frozen else None}
        if frozen:
            methods |= {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
        for name, method in methods.items():
            if name not in vars(cls):  # one that is written out stays
                setattr(cls, name, method)
        return cls

    def _init(cls: type, fields: Any) -> Any:
        names = [field.name for field in fields]
        known = frozenset(names)
        usual = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        made = {field.name: make for field in fields if (make := field.default_factory) is not dataclasses.MISSING}
        has_more = hasattr(cls, "__post_init__")
        what = f"{cls.__qualname__}.__init__()"

        # By how many arguments are given by their places: what the others are, if all of them have a default.
        rest = [
            {name: usual[name] for name in names[n:]} if usual.keys() >= set(names[n:]) else None
            for n in range(len(names) + 1)
        ]

        def init(self, /, *args: Any, **given: Any) -> None:
            values = vars(self)
            if given or len(args) > len(names) or (others := rest[len(args)]) is None:
                values.update(arguments(args, given))
            else:
                values.update(zip(names, args, strict=False))
                if others:
                    values.update(others)
            if has_more:
                self.__post_init__()

        def arguments(args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
            if len(args) > len(names):
                raise TypeError(f"{what} takes {len(names)} arguments, and {len(args)} were given")
            for name in given:
                if name not in known:
                    raise TypeError(f"{what} got an unexpected keyword argument {name!r}")
                if name in names[: len(args)]:
                    raise TypeError(f"{what} got multiple values for argument {name!r}")
            values = usual | dict(zip(names, args, strict=False)) | given
            values |= {name: make() for name, make in made.items() if name not in values}
            if len(values) < len(names):
                missing = ", ".join(repr(name) for name in names if name not in values)
                raise TypeError(f"{what} misses {missing}")
            return {name: values[name] for name in names}

        return init

    def _repr(names: list[str]) -> Any:
        def repr_(self) -> str:
            inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
            return f"{type(self).__qualname__}({inside})"

        return repr_

    def _eq(names: list[str]) -> Any:
        def eq(self, other: object) -> bool:
            if other.__class__ is not self.__class__:
                return NotImplemented
            return [getattr(self, name) for name in names] == [getattr(other, name) for name in names]

        return eq

    def _hash(names: list[str]) -> Any:
        def hash_(self) -> int:
            return hash(tuple([getattr(self, name) for name in names]))

        return hash_

    def _refuse_to_set(self, name: str, value: object) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def _refuse_to_delete(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
