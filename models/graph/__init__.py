"""The vocabulary in which a model is described, and the builder that the architectures speak to.

A graph is a list of operations in the order in which they run. Nothing here computes: the engine compiles the
operations, and the tests interpret them with NumPy (`tests/reference.py`), which is also their exact definition.
Every `Value` is a float32 array [rows, width]; the rows are the tokens of one step.
"""

# ruff: noqa: F401
from qrun.models.graph.builder import GraphBuilder
from qrun.models.graph.experts import Adjustment, Change, Gating, MoE
from qrun.models.graph.graph import STATEFUL, Graph, Operation
from qrun.models.graph.row_operations import (
    Activate,
    ActivateAlone,
    Activation,
    Add,
    Affine,
    Alone,
    Balance,
    Clamp,
    Dot,
    Embed,
    Gate,
    GateKind,
    GaussianTopK,
    HeadLinear,
    Input,
    Join,
    LayerNorm,
    Linear,
    MatchMagnitude,
    Mix,
    MixByScore,
    RMSNorm,
    Rope,
    Rotation,
    Scale,
    SelectRows,
    Slice,
    Softcap,
    Temperature,
)
from qrun.models.graph.sequence_operations import (
    WKV,
    WKV_MULTIPLE,
    Attention,
    CacheLayer,
    Convolution,
    EmbedHashes,
    Hashes,
    Keep,
    LinearAttention,
    Pool,
    SelectiveScan,
    Side,
)
from qrun.models.graph.values import Constant, Indices, Value, Weight
