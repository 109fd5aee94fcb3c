"""With a pack of kernels (see the engine's hook), the tables of IQ weights are in its code: the package that has them,
and what that brings along, stay outside."""

from qrun.engine.pyinstaller import pack

if pack() is not None:
    excludedimports = ["gguf"]
