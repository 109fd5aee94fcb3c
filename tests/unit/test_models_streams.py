"""Models with more than one residual stream, or copies of it, and with rows for the last tokens: Kimi K3, GLM-5.3-Flash
and Qwen3.8-Flash-Next."""

from typing import Any

import numpy as np
import pytest
from test_models import N_EMBD, N_FF, N_VOCAB, Toy, of_type

from qrun.models.graph import Balance, Convolution, EmbedHashes, LinearAttention, MixByScore
from tests.reference import forward

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
HEADS, DIM, TAPS, STREAMS, NARROW = 4, 8, 3, 4, 5
WIDTH = HEADS * DIM
LENGTH, PER_LENGTH = 3, 2


def add_delta(toy: Toy, layer: int) -> None:
    """Kimi delta attention."""
    block = f"blk.{layer}"
    for part in "qkv":
        toy.add(f"{block}.attn_{part}.weight", WIDTH, N_EMBD)
        toy.add(f"{block}.ssm_conv1d_{part}.weight", WIDTH, 1, TAPS)
    for name, shape in {
        "ssm_a": (HEADS,), "ssm_dt.bias": (WIDTH,), "ssm_f_a.weight": (DIM, N_EMBD), "ssm_f_b.weight": (WIDTH, DIM),
        "ssm_beta.weight": (HEADS, N_EMBD), "ssm_norm.weight": (DIM,), "ssm_g_a.weight": (DIM, N_EMBD),
        "ssm_g_b.weight": (WIDTH, DIM), "attn_output.weight": (N_EMBD, WIDTH),
    }.items():  # fmt: skip
        toy.add(f"{block}.{name}", *shape)


def with_delta(architecture: str, n_layer: int, **more: Any) -> Toy:
    keys: dict[str, Any] = {
        "attention.head_count_kv": np.zeros(n_layer, np.int32), "kda.head_dim": DIM, "kda.gate_lower_bound": -5.0,
        "ssm.conv_kernel": TAPS, "leading_dense_block_count": n_layer,
    }  # fmt: skip
    toy = Toy(architecture, n_layer, **keys | more)
    for layer in range(n_layer):
        add_delta(toy, layer)
    return toy


def kimi_k3(every: int, n_layer: int = 5, **more: Any) -> Toy:
    sizes = {"attn_res.block_size": every, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}
    toy = with_delta("kimi-k3", n_layer, **sizes | more)
    for layer in range(n_layer):
        toy.add(f"blk.{layer}.attn_res_score.weight", N_EMBD)
        toy.add(f"blk.{layer}.ffn_res_score.weight", N_EMBD)
    toy.add("output_res_score.weight", N_EMBD)
    return toy


def glm5_next(**more: Any) -> Toy:
    sizes: dict[str, Any] = {
        "attention.indexer.top_k": 64, "hyper_connection.count": STREAMS, "hyper_connection.epsilon": 1e-6,
        "hyper_connection.sinkhorn_iterations": 3, "rope.dimension_count": 0,
    }  # fmt: skip
    toy = with_delta("glm5-next", 2, **sizes | more)
    toy.add("output.weight", N_VOCAB, N_EMBD)
    for name in ("blk.0.hc_attn", "blk.0.hc_ffn", "blk.1.hc_attn", "blk.1.hc_ffn"):
        toy.add(f"{name}_fn.weight", (2 + STREAMS) * STREAMS, STREAMS * N_EMBD)
        toy.add(f"{name}_base.weight", (2 + STREAMS) * STREAMS)
        toy.add(f"{name}_scale.weight", 3)
    return toy


def qwen4exp(**more: Any) -> Toy:
    count = (LENGTH - 1) * PER_LENGTH
    sizes: dict[str, Any] = {
        "ssm.conv_kernel": TAPS, "ssm.state_size": DIM, "ssm.inner_size": WIDTH, "ssm.time_step_rank": HEADS,
        "ssm.group_count": 2, "hyper_connection.count": STREAMS, "hyper_connection.low_rank": NARROW,
        "attention.recurrent_layers": np.array([1, 0], np.int32), "attention.indexer.top_k": 64, "expert_used_count": 1,
        "attention.compress_ratios": np.array([4, 4], np.int32), "expert_feed_forward_length": N_FF,
        "ple.layers": np.array([0], np.int32), "ple.ngram_size": LENGTH, "ple.heads_per_ngram": PER_LENGTH,
        "ple.conv_kernel": 4, "ple.eos_token_id": 0, "embedding_length_per_layer_input": N_EMBD // count,
        "ple.layer_multipliers": np.array([3, 5, 7], np.uint64), "ple.head_offsets": np.arange(count) * 20,
        "ple.head_vocab_sizes": np.full(count, 20),
    }  # fmt: skip
    toy = Toy("qwen4exp", 2, 2, **sizes | more)
    toy.add("per_layer_token_embd.weight", 20 * count, N_EMBD // count)
    toy.add("blk.1.attn_q.weight", 2 * 4 * 16, N_EMBD)
    for name, shape in {
        "attn_qkv.weight": (2 * 2 * DIM + WIDTH, N_EMBD), "attn_gate.weight": (WIDTH, N_EMBD), "ssm_dt.bias": (HEADS,),
        "ssm_conv1d.weight": (2 * 2 * DIM + WIDTH, TAPS), "ssm_a": (HEADS,), "ssm_beta.weight": (HEADS, N_EMBD),
        "ssm_alpha.weight": (HEADS, N_EMBD), "ssm_norm.weight": (DIM,), "ssm_out.weight": (N_EMBD, WIDTH),
        "ple_key.weight": (STREAMS * N_EMBD, N_EMBD), "ple_value.weight": (N_EMBD, N_EMBD),
        "ple_norm_key.weight": (STREAMS, N_EMBD), "ple_norm_query.weight": (STREAMS, N_EMBD),
        "ple_norm_conv.weight": (STREAMS * N_EMBD,), "ple_conv1d.weight": (STREAMS * N_EMBD, 4),
    }.items():  # fmt: skip
        toy.add(f"blk.0.{name}", *shape)
    names = [f"blk.{layer}.hc_{part}" for layer in range(2) for part in ("attn", "ffn")]
    for name in (*names, "output_hc"):
        toy.add(f"{name}_norm.weight", STREAMS, N_EMBD)
        toy.add(f"{name}_down.weight", NARROW, STREAMS * N_EMBD)
        toy.add(f"{name}_up.weight", STREAMS * N_EMBD, NARROW)
        toy.add(f"{name}_inject.weight", STREAMS, STREAMS * N_EMBD)
    return toy


@pytest.mark.parametrize(("every", "copies"), [(0, []), (1, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), (3, [1] * 6 + [2] * 4)])
def test_kimi_k3_reads_copies_of_the_stream_by_how_well_they_fit(every: int, copies: list[int]) -> None:
    """Nothing is copied before the first layer; the second part of a layer and the next layer see its copy."""
    graph = kimi_k3(every).graph(64)
    found = [mix.x.width // N_EMBD for mix in of_type(graph, MixByScore)]
    assert found == copies
    assert np.isfinite(forward(graph, TOKENS)).all()


def test_kimi_k3_turns_the_sign_of_what_decays_are_made_of() -> None:
    """The file has the factors of other Kimi models, which are negative."""
    toy = kimi_k3(0, 1)
    decays = [operation.decay for operation in of_type(toy.graph(), LinearAttention)]
    factors = toy.tensors["blk.0.ssm_a"].raw.view(np.float32)
    weights = [vars(operation).get("weight") for operation in toy.graph().operations]
    assert len(decays) == 1
    assert any(isinstance(one, np.ndarray) and np.array_equal(one, -np.repeat(factors, DIM)) for one in weights)


def test_glm5_next_balances_what_streams_exchange_and_has_a_longest_context() -> None:
    graph = glm5_next().graph(64)
    assert [balance.rounds for balance in of_type(graph, Balance)] == [3] * 4 and graph.max_context == 64
    assert np.isfinite(forward(graph, TOKENS)).all()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention.indexer.kpool_select_tail", False, "is False: not to see the last tokens is not supported"),
        ("rope.dimension_count", 8, "is 8, expected 0 to 0"),
        ("hyper_connection.count", 1, "is 1, expected 2 to 64"),
        ("hyper_connection.count", 3, "tensor blk.0.hc_attn_fn.weight has shape"),
    ],
)
def test_what_glm5_next_cannot_be_is_refused(key: str, value: Any, reason: str) -> None:
    assert reason in glm5_next(**{key: value}).error()


def test_qwen4exp_has_rows_for_the_last_tokens_in_one_layer() -> None:
    graph = qwen4exp().graph(64)
    (rows,) = of_type(graph, EmbedHashes)
    assert rows.hashes.multipliers == (3, 5, 7) and graph.max_context == 64
    # Taps as far apart as the rows look back.
    spread = max((len(convolution.weight) for convolution in of_type(graph, Convolution)), default=0)
    assert spread == 3 * LENGTH + 1
    logits, other = forward(graph, TOKENS), forward(graph, [7, *TOKENS[1:]])
    assert np.isfinite(logits).all() and np.abs(logits[2] - other[2]).max() > 1e-5


def test_qwen4exp_without_a_table_or_sparse_attention() -> None:
    graph = qwen4exp(**{"ple.layers": None, "attention.compress_ratios": 0}).graph(64)
    assert not of_type(graph, EmbedHashes) and graph.max_context is None


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("ple.layers", np.array([0, 1], np.int32), "ple.layers are 2: more than one is not supported"),
        ("ple.layers", np.array([2], np.int32), "ple.layers is 2, expected 0 to 1"),
        ("ple.head_offsets", np.array([0, 20, 40, 61]), "ple.head_offsets go beyond the 80 rows"),
        ("ple.head_vocab_sizes", np.array([20, 20, 20, 0]), "ple.head_vocab_sizes is 0"),
        ("ple.head_vocab_sizes", np.array([20, 20, 20]), "is not an array of 4 whole numbers"),
        ("ple.layer_multipliers", np.array([1.0, 2.0, 3.0]), "is not an array of 3 whole numbers"),
        ("ple.heads_per_ngram", 60, "more than 64 rows are not supported"),
        ("ple.eos_token_id", N_VOCAB, "ple.eos_token_id is 40"),
        ("embedding_length_per_layer_input", 7, "is 7, and 4 rows are not 32 wide"),
    ],
)
def test_tables_that_do_not_fit_are_refused(key: str, value: Any, reason: str) -> None:
    assert reason in qwen4exp(**{key: value}).error()
