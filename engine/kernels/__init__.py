"""The kernels, by key. A key names a function, and what it is specialised for: "matmul-Q4_K", "attention-f16".

Every kernel is `kernel(op, step, thread)`: the address of its operation's record, of the step's record, and the number
of the thread that runs it. `build` gives the Python function for the compiler; nothing here is called from Python.
"""

from collections.abc import Callable
from importlib import import_module

# What a key begins with, and the module that has it. The rest of the key goes to the module's `build`.
_MODULES = {
    "begin_step": "team",
    "run_step": "team",
    "serve": "team",
    "matmul": "matmul",
    "append": "attention",
    "embed": "embed",
    **dict.fromkeys(("route", "to_experts", "from_experts"), "experts"),
    "attention": "attention",
    "quantize": "quantize",
    **dict.fromkeys(("pack", "add", "scale", "softcap", "silu", "gelu", "rms_norm", "select_rows", "rope"), "rows"),
}


def build(key: str) -> Callable[[int, int, int], None]:
    name, _, variant = key.partition("-")
    module = import_module(f"qrun.engine.kernels.{_MODULES[name]}")
    function = getattr(module, name)
    function = function if _MODULES[name] == "team" else function(variant)
    return getattr(function, "py_func", function)
