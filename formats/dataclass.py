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
    from reprlib import recursive_repr

    def dataclass(cls: type | None = None, /, *, frozen: bool = False, eq: bool = True) -> Any:
        """As in the library, with so many of its options."""
        if cls is None:
            return lambda made: dataclass(made, frozen=frozen, eq=eq)
        # What is frozen and what is not do not mix: the library looks after that where it has to.
        has_bases = any(map(dataclasses.is_dataclass, cls.__bases__))
        dataclasses.dataclass(init=False, repr=False, eq=False, frozen=frozen and has_bases)(cls)
        cls.__dataclass_params__.frozen = frozen
        cls.__dataclass_params__.eq = eq
        fields = dataclasses.fields(cls)
        methods = {"__init__": _init(cls, fields), "__repr__": _repr([field.name for field in fields if field.repr])}
        if eq:
            compared = [field.name for field in fields if field.compare]
            methods |= {"__eq__": _eq(compared), "__hash__": _hash(compared) if frozen else None}
        if frozen:
            methods |= _frozen(cls, frozenset(field.name for field in fields))
        if "__init__" not in vars(cls):
            cls.__signature__ = _Signature(methods["__init__"], fields)
        for name, method in methods.items():
            # One that is written out stays. Python itself takes the hash away from a class that has an __eq__.
            if name not in vars(cls) or (name == "__hash__" and cls.__hash__ is None):
                setattr(cls, name, method)
        return cls

    class _Signature:
        """What a class is called with, for those who ask: its `__init__` takes anything."""

        def __init__(self, init: Any, fields: Any) -> None:
            self._init = init
            self._fields = fields

        def __get__(self, instance: object, cls: type) -> Any:
            if cls.__init__ is not self._init:
                raise AttributeError("__signature__")  # a subclass with an `__init__` of its own
            from inspect import Parameter, Signature

            missing = dataclasses.MISSING
            parameters = []
            for field in self._fields:
                default = field.default if field.default_factory is missing else field.default_factory()
                default = Parameter.empty if default is missing else default
                kind = Parameter.POSITIONAL_OR_KEYWORD
                parameters.append(Parameter(field.name, kind, default=default, annotation=field.type))
            return Signature(parameters, return_annotation=None)

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
        @recursive_repr()
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

    def _frozen(cls: type, names: frozenset[str]) -> dict[str, Any]:
        """A subclass that is no dataclass may have attributes of its own that change."""

        def setattr_(self, name: str, value: object) -> None:
            if type(self) is cls or name in names:
                raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
            super(cls, self).__setattr__(name, value)

        def delattr_(self, name: str) -> None:
            if type(self) is cls or name in names:
                raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
            super(cls, self).__delattr__(name)

        return {"__setattr__": setattr_, "__delattr__": delattr_}
