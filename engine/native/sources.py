"""A name for the sources that kernels are compiled from.

It is made when the distribution is built (see `setup.py`), so that all forms in which one version of qrun is packed
give it alike, and none reads its own sources. In a checkout it is made of the files as they are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import types
from typing import Any

PACKAGES = ("qrun.engine.simd", "qrun.engine.kernels", "qrun.formats.blocks")
"""Kernels, and what they are built from: the quantisers' from what `formats.blocks` says of the types."""
MODULES = ("qrun.engine.native.codegen", "qrun.engine.native.linker")


@functools.cache
def sources_digest() -> str:
    """The name of the sources that this process has."""
    try:
        from qrun.engine.native.built import SOURCES  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return digest_of({name: _source(name) for name in source_names()})
    return str(SOURCES)


def digest_of(sources: dict[str, bytes]) -> str:
    """The name of sources by the names of their modules."""
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:24]


def source_names() -> list[str]:
    import pkgutil

    names = [*MODULES]
    for package in PACKAGES:
        paths = importlib.import_module(package).__path__
        names += [package, *(f"{package}.{module.name}" for module in pkgutil.iter_modules(paths))]
    return names


def _source(name: str) -> bytes:
    """A module's source, or where an app was packed without sources, its bytecode."""
    loader: Any = getattr(importlib.util.find_spec(name), "loader", None)
    if loader is None:
        return b""
    source = loader.get_source(name)
    return source.encode() if source is not None else _bytecode(loader.get_code(name))


def _bytecode(code: types.CodeType | None) -> bytes:
    """All that a code object does. Its marshalled form will not do: that depends on what else the process holds."""
    if code is None:
        return b""
    parts: list[object] = [code.co_name, code.co_flags, code.co_argcount, code.co_names, code.co_varnames]
    parts += [code.co_freevars, code.co_cellvars, code.co_code, code.co_exceptiontable]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts.append(_bytecode(constant))
        else:  # sets have no order
            parts.append(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
    return repr(parts).encode()
