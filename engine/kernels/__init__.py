"""The kernels, by key. A key names a function, and what it is specialised for: "matmul-Q4_K", "attention-f16".

Every kernel is `kernel(op, step, thread)`: the address of its operation's record, of the step's record, and the number
of the thread that runs it. It takes chunks of the work from its operation's counter until none is left, or it does one
part of STEP_PARTS, and then that part's number comes in place of the thread's (`in_parts`). `build` gives the Python
function for the compiler; nothing here is called from Python.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `build` imports kernels by name: those who pack apps see here which there are
    from qrun.engine.kernels import (  # noqa: F401
        attention,
        convolution,
        embed,
        experts,
        heads,
        linear_attention,
        lora,
        matmul,
        moments,
        observe,
        peaks,
        pool,
        quantize,
        read,
        rows,
        selective_scan,
        sparse_attention,
        spread,
        team,
        wkv,
    )
    from qrun.engine.simd.target import Target

ROW_OPERATIONS = (
    "add", "scale", "affine", "softcap", "clamp", "silu", "clamped_silu", "limited_silu", "gelu", "gelu_alone", "relu",
    "swiglu_oai", "xielu", "silu_alone", "sigmoid", "softplus", "rms_norm", "layer_norm", "select_rows", "join", "mix",
    "match_magnitude", "gaussian_top_k", "situ", "mix_by_score", "balance", "dot", "signed_root", "exp",
    "relu_alone",
)  # fmt: skip

GATES = ("sigmoid", "softplus", "silu", "identity")
LINEAR_ATTENTION = (("plain", "head"), ("delta", "head"), ("delta", "dimension"))

# What a key begins with, and the module that has it. The rest of the key goes to the module's `build`.
_MODULES = {
    "lead": "team",
    "serve": "team",
    "matmul": "matmul",
    "append": "attention",
    **dict.fromkeys(("embed", "embed_hashes"), "embed"),
    **dict.fromkeys(("route", "to_experts", "adjust_experts", "weigh_experts", "from_experts"), "experts"),
    **dict.fromkeys(("to_heads", "from_heads"), "heads"),
    "attention": "attention",
    "convolution": "convolution",
    "linear_attention": "linear_attention",
    **dict.fromkeys(("lora_down", "lora_up"), "lora"),
    "selective_scan": "selective_scan",
    "wkv": "wkv",
    "quantize": "quantize",
    "observe": "observe",
    "peaks": "peaks",
    "pool": "pool",
    **dict.fromkeys(("index_scores", "index_choose", "sparse_attention"), "sparse_attention"),
    "spread": "spread",
    "moments": "moments",
    "read": "read",
    **dict.fromkeys(("pack", "rope", "gate", *ROW_OPERATIONS), "rows"),
}


def build(key: str) -> Callable[[int, int, int], None]:
    name, _, variant = key.partition("-")
    module = import_module(f"qrun.engine.kernels.{_MODULES[name]}")
    function = getattr(module, name)
    function = function if _MODULES[name] == "team" else function(variant)
    return getattr(function, "py_func", function)


def require(key: str) -> None:
    """Raises ImportError if something that the kernel is built from is not installed."""
    from qrun.formats.blocks.grids import GRIDS, grid

    type_name = key.partition("-")[2]
    if type_name in GRIDS:
        grid(GRIDS[type_name])


def in_parts(key: str) -> bool:
    return not key.startswith(("matmul-", "attention-", "linear_attention-", "index_", "sparse_attention-"))


def all_keys(target: Target | None = None) -> list[str]:
    """The keys of all kernels that any model may need; without a target, of those that all machines have."""
    from qrun.engine.kernels.records import KIND_BITS, MAX_HEADS_TOGETHER
    from qrun.engine.kernels.unpack import TYPES, Quantised

    tiled = ("f16", "bf16") if target is not None and target.tiles else ()
    whole = ("whole",) if target is not None and target.whole_tiles else ()
    in_tiles = [name.upper() for name in tiled]
    in_tiles += [name for name, spec in TYPES.items() if whole and isinstance(spec, Quantised)]
    packings, heads = ("q8", "f32", *tiled), range(1, MAX_HEADS_TOGETHER + 1)
    of_rows = (*packings, *whole)  # experts and heads have no tiles of whole numbers
    layouts = ("", "-rows", "-rows-entries")
    return [
        *(name for name, module in _MODULES.items() if module == "team"),
        *(f"{name}-{type_}" for name in ("matmul", "embed", "embed_hashes") for type_ in TYPES),
        *(f"matmul-{type_}-tiles" for type_ in in_tiles),
        *(f"append-{kind}" for kind in KIND_BITS),
        *(f"{name}-{kind}-{together}{layout}" for name in ("attention", "sparse_attention") for kind in KIND_BITS
          for together in heads for layout in layouts),
        *(f"{name}-f16-{n}" for name in ("index_scores", "index_choose") for n in heads),
        *(f"pack-{packing}" for packing in of_rows),
        *(f"{name}-{packing}" for name in ("to_experts", "to_heads") for packing in packings),
        *(f"observe-{variant}" for variant in ("rows", "experts", "keep")),
        *(f"convolution-{activation}" for activation in ("", "silu")),
        *(f"wkv-{rule}" for rule in ("plain", "delta")),
        *(f"linear_attention-{rule}-{fading}" for rule, fading in LINEAR_ATTENTION),
        *(f"{name}-" for name in ("rope", "route", "adjust_experts", "weigh_experts", "from_experts", "from_heads",
                                "selective_scan", "pool", "lora_down", "lora_up", "peaks")),
        *(f"{name}-{packing}" for name in (*ROW_OPERATIONS, *(f"gate-{kind}" for kind in GATES))
          for packing in ("", *of_rows)),
    ]  # fmt: skip
