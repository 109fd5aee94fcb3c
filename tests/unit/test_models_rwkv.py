"""RWKV: how a token meets the one before it, what its files may lack, and what is refused."""

from typing import Any

import numpy as np
import pytest
from test_models import N_EMBD, N_FF, N_VOCAB, Toy, of_type

from qrun.models.graph import WKV, Convolution, Join
from tests.reference import forward

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
RANK = 4
KEYS: dict[str, Any] = {
    "wkv.head_size": 16, "attention.head_count": 0, "attention.head_count_kv": None, "attention.key_length": None,
    "attention.value_length": None, "attention.layer_norm_epsilon": 1e-5, "time_mix_extra_dim": RANK,
    "time_decay_extra_dim": RANK, "attention.decay_lora_rank": RANK, "attention.iclr_lora_rank": RANK,
    "attention.value_residual_mix_lora_rank": RANK, "attention.gate_lora_rank": RANK,
}  # fmt: skip


def add_vectors(toy: Toy, name: str, *parts: str) -> None:
    for part in parts:
        toy.add(f"{name}_{part}.weight", N_EMBD)


def rwkv_7(architecture: str = "arwkv7", *, gated: bool = True) -> Toy:
    toy = Toy(architecture, **KEYS)
    for layer in range(2):
        name = f"blk.{layer}.time_mix"
        toy.add(f"{name}_lerp_fused.weight", 5 + gated, 1, 1, N_EMBD)
        add_vectors(toy, name, "w0", "a0", "v0", "k_k", "k_a", "r_k")
        for part in ("w", "a", "v", "g") if gated else ("w", "a", "v"):
            toy.add(f"{name}_{part}1.weight", RANK, N_EMBD)
            toy.add(f"{name}_{part}2.weight", N_EMBD, RANK)
        for part in ("key", "value", "receptance", "output"):
            toy.add(f"{name}_{part}.weight", N_EMBD, N_EMBD)
    return toy


def rwkv_6(architecture: str = "rwkv6", n_kv_heads: int | None = None, *, fused: bool = True, **more: Any) -> Toy:
    toy = Toy(architecture, **KEYS | {"attention.head_count_kv": n_kv_heads} | more)
    n_kv = 16 * (n_kv_heads or N_EMBD // 16)
    toy.add("output_norm.bias", N_EMBD)
    toy.add("token_embd_norm.weight", N_EMBD)
    for layer in range(2):
        block, name = f"blk.{layer}", f"blk.{layer}.time_mix"
        toy.add(f"{block}.attn_norm_2.weight", N_EMBD)
        add_vectors(toy, name, "lerp_x", "decay", "first", "ln")
        toy.add(f"{name}_ln.bias", N_EMBD)
        if fused:
            toy.add(f"{name}_lerp_fused.weight", 5, 1, 1, N_EMBD)
        else:
            add_vectors(toy, name, *(f"lerp_{part}" for part in "wkvrg"))
        toy.add(f"{name}_w1.weight", 5 * RANK, N_EMBD)
        toy.add(f"{name}_w2.weight", 5, N_EMBD, RANK)
        toy.add(f"{name}_decay_w1.weight", RANK, N_EMBD)
        toy.add(f"{name}_decay_w2.weight", N_EMBD, RANK)
        for part, width in (("key", n_kv), ("value", n_kv), ("receptance", N_EMBD), ("gate", N_EMBD)):
            toy.add(f"{name}_{part}.weight", width, N_EMBD)
        toy.add(f"{name}_output.weight", N_EMBD, N_EMBD)
        add_vectors(toy, f"{block}.channel_mix", "lerp_k", "lerp_r")
        toy.add(f"{block}.channel_mix_key.weight", N_FF, N_EMBD)
        toy.add(f"{block}.channel_mix_value.weight", N_EMBD, N_FF)
        toy.add(f"{block}.channel_mix_receptance.weight", N_EMBD, N_EMBD)
    return toy


def test_a_memory_for_each_head_and_no_attention() -> None:
    graph = rwkv_6().graph(64)
    assert graph.cache_layers == [] and [wkv.n_heads for wkv in of_type(graph, WKV)] == [2, 2]
    # What a token adds is read from the memory only by those behind it: three rows more are those of the one before.
    assert len(of_type(graph, Convolution)) == 2 * (2 + 3) and graph.n_states == 2 * (2 + 3 + 1)
    logits = forward(graph, TOKENS)
    assert logits.shape == (len(TOKENS), N_VOCAB) and np.isfinite(logits).all()
    assert np.abs(logits[-1] - forward(graph, [7, *TOKENS[1:]])[-1]).max() > 1e-4  # the first token is not forgotten


def test_older_files_have_the_weights_of_mixtures_apart() -> None:
    fused, apart = rwkv_6().graph(64), rwkv_6(fused=False)
    lerps = [apart.tensors[f"blk.0.time_mix_lerp_{part}.weight"].raw.view(np.float32) for part in "wkvrg"]
    assert [type(one) for one in fused.operations] == [type(one) for one in apart.graph(64).operations]
    biases = [vars(one)["bias"] for one in apart.graph(64).operations if vars(one).get("bias") is not None]
    assert any(np.array_equal(bias, np.concatenate(lerps)) for bias in biases)


def test_every_few_layers_are_halved_where_the_file_says_so() -> None:
    plain, halved = (rwkv_6(rescale_every_n_layers=every).graph(64) for every in (0, 2))
    assert len(halved.operations) == len(plain.operations) + 1


def test_fewer_heads_of_keys_and_values_are_repeated() -> None:
    graph = rwkv_6("rwkv6qwen2", 1).graph(64)
    assert len(of_type(graph, Join)) == 2 * 2 and all(wkv.a is None for wkv in of_type(graph, WKV))
    assert "attention.head_count_kv is 3, which does not divide 2 heads" in rwkv_6("rwkv6qwen2", 3).error()


@pytest.mark.parametrize("gated", [True, False])
def test_a_gate_is_there_or_not(gated: bool) -> None:
    graph = rwkv_7(gated=gated).graph(64)
    assert all(wkv.a is not None for wkv in of_type(graph, WKV))
    assert np.isfinite(forward(graph, TOKENS)).all()


def test_a_gate_without_its_mixture_is_refused() -> None:
    toy = rwkv_7()
    toy.add("blk.1.time_mix_lerp_fused.weight", 5, 1, 1, N_EMBD)
    assert "tensor blk.1.time_mix_lerp_fused.weight has nothing for the gate" in toy.error()


@pytest.mark.parametrize("size", [0, 12, 48, 512])
def test_heads_of_odd_sizes_are_refused(size: int) -> None:
    assert "rwkv7.wkv.head_size is" in rwkv_7("rwkv7").set({"wkv.head_size": size}).error()
