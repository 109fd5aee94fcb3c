"""With a pack of kernels (see the engine's hook), the tables of IQ weights are in its code: the package that has them,
and what that brings along, stay outside."""

import os

if os.environ.get("QRUN_KERNELS"):
    excludedimports = ["gguf"]
