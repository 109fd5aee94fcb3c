"""The builder: what it takes from a file, what it refuses, and what it appends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.formats import FormatError, TensorInfo, TensorType
from qrun.models.graph import Add, CacheLayer, Embed, GraphBuilder, Linear, RMSNorm, Rotation, Value


def tensor(name: str, values: Any, type: TensorType = TensorType.F32) -> TensorInfo:
    array = np.asarray(values, np.float32)
    raw = array.reshape(-1).view(np.uint8)
    return TensorInfo(name, type, array.shape, raw.size, 0, Path("toy.gguf"), raw)


def builder(*tensors: TensorInfo) -> GraphBuilder:
    reader: Any = SimpleNamespace(path=Path("toy.gguf"), tensors={tensor.name: tensor for tensor in tensors})
    return GraphBuilder(reader)


def test_operations_are_kept_in_order_and_values_are_numbered() -> None:
    b = builder(tensor("embd.weight", np.zeros((5, 4))), tensor("norm.weight", np.ones(4)))
    x = b.embed("embd", 5, 4, scale=2.0)
    y = b.rms_norm(x, "norm", eps=1e-5)
    z = b.add(x, y)
    assert (x, y, z) == (Value(0, 4), Value(1, 4), Value(2, 4))
    assert [type(operation) for operation in b.operations] == [Embed, RMSNorm, Add]


def test_a_tensor_used_twice_is_one_weight() -> None:
    b = builder(tensor("embd.weight", np.zeros((5, 4))))
    b.linear(b.embed("embd", 5, 4), "embd", 5)
    embed, linear = b.operations
    assert isinstance(embed, Embed) and isinstance(linear, Linear)
    assert embed.weight is linear.weight


def test_weights_stay_in_file_layout_and_constants_are_decoded() -> None:
    matrix, bias = tensor("m.weight", np.arange(8).reshape(2, 4)), tensor("m.bias", [1, 2])
    b = builder(matrix, bias)
    b.linear(Value(0, 4), "m", 2)
    (linear,) = b.operations
    assert isinstance(linear, Linear) and linear.bias is not None
    assert linear.weight.raw is matrix.raw and linear.weight.shape == (2, 4)
    assert linear.bias.dtype == np.float32 and linear.bias.tolist() == [1, 2]


def test_a_bias_is_optional() -> None:
    b = builder(tensor("m.weight", np.zeros((2, 4))))
    b.linear(Value(0, 4), "m", 2)
    (linear,) = b.operations
    assert isinstance(linear, Linear) and linear.bias is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "toy.gguf: tensor m.weight is missing"),
        ([tensor("m.weight", np.zeros((4, 2)))], "toy.gguf: tensor m.weight has shape (4, 2), expected (2, 4)"),
        ([tensor("m.weight", np.zeros(8))], "toy.gguf: tensor m.weight has shape (8,), expected (2, 4)"),
        (
            [tensor("m.weight", np.zeros((2, 4)), TensorType.I32)],
            "toy.gguf: tensor m.weight has type I32, which is not supported",
        ),
        (
            [tensor("m.weight", np.zeros((2, 4))), tensor("m.bias", [0, 0, 0])],
            "toy.gguf: tensor m.bias has shape (3,), expected (2,)",
        ),
        (
            [tensor("m.weight", np.zeros((2, 4))), tensor("m.bias", [0, np.nan])],
            "toy.gguf: tensor m.bias has values that are not finite",
        ),
    ],
)
def test_a_wrong_tensor_is_named(tensors: list[TensorInfo], message: str) -> None:
    with pytest.raises(FormatError) as error:
        builder(*tensors).linear(Value(0, 4), "m", 2)
    assert str(error.value) == message


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 4), (1, 3, 4, 1), (12,), (1, 1, 12)])
def test_some_constants_may_be_flat_or_have_dimensions_of_one_between(shape: tuple[int, ...]) -> None:
    values = np.arange(12, dtype=np.float32)
    found = builder(tensor("c", values.reshape(shape))).loose_constant("c", 3, 4)
    np.testing.assert_array_equal(found, values.reshape(3, 4))


@pytest.mark.parametrize("shape", [(4, 3), (2, 6), (13,), (12, 2)])
def test_they_may_not_be_turned_about(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"tensor c has shape .* expected \(3, 4\)"):
        builder(tensor("c", np.zeros(shape))).loose_constant("c", 3, 4)


def test_experts_in_separate_tensors_are_refused() -> None:
    b = builder(tensor("blk.0.ffn_gate.0.weight", np.zeros((8, 4))))
    with pytest.raises(FormatError, match="a tensor per expert is an old layout"):
        b.moe(Value(0, 4), "blk.0", n_expert=2, n_used=1, n_ff=8, kind="silu")


def test_each_attention_gets_a_cache_layer_of_its_own() -> None:
    b = builder()
    wide, narrow = CacheLayer(4, 2, 8, 8, None), CacheLayer(4, 1, 8, 8, window=16)
    for cache in (wide, narrow):
        out = b.attention(Value(0, 32), Value(1, cache.n_kv_heads * 8), Value(2, cache.n_kv_heads * 8), cache, 1.0)
        assert out.width == 32
    assert b.cache_layers == [wide, narrow]
    assert [operation.layer for operation in b.operations] == [0, 1]  # type: ignore[union-attr]


def test_rope_takes_two_dimensions_a_frequency() -> None:
    b = builder()
    b.rope(Value(0, 32), 16, Rotation(np.ones(4, np.float32), 1.5, True))
    (rope,) = b.operations
    assert (rope.n_rot, rope.head_dim, rope.magnitude, rope.interleaved) == (8, 16, 1.5, True)  # type: ignore[union-attr]
