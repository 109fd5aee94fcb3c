"""Writes embedders.json: sketches (see tests.sketches) of models that make embeddings. Beside them is what the
reference engine makes of them: the first numbers of each vector, by llama.h's number of the pooling.

    python -m tests.data.make_embedders PROGRAM

PROGRAM is linked against llama.cpp: `PROGRAM model.gguf out.f32 POOLING TOKEN...` writes embeddings of the tokens, with
llama.h's number of a pooling: all rows of 0, one vector of others, and -1 leaves it to the file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qrun.formats import GGUFWriter, TensorType, ValueType
from qrun.models import build_graph
from tests.reference import forward
from tests.sketches import EMBEDDERS, TOKENS, model, some_logits
from tests.toys import error

N_VOCAB, N_EMBD, N_FF, N_LAYER, N_HEADS = 128, 48, 80, 3, 3

Shapes = dict[str, list[int]]


def normed(name: str, width: int = N_EMBD, bias: bool = True) -> Shapes:
    return {f"{name}.weight": [width], **({f"{name}.bias": [width]} if bias else {})}


def matrix(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": [rows, columns], **({f"{name}.bias": [rows]} if bias else {})}


def attention(block: str, bias: bool, joined: bool = False, kv: int = N_EMBD) -> Shapes:
    parts = {"attn_qkv": N_EMBD + 2 * kv} if joined else {"attn_q": N_EMBD, "attn_k": kv, "attn_v": kv}
    found: Shapes = {}
    for name, rows in parts.items():
        found |= matrix(f"{block}.{name}", rows, N_EMBD, bias)
    return found | matrix(f"{block}.attn_output", N_EMBD, N_EMBD, bias)


def bert(layers: list[Shapes], bias: bool = True, joined: bool = False, types: bool = True) -> Shapes:
    found: Shapes = {"token_embd.weight": [N_VOCAB, N_EMBD], **normed("token_embd_norm")}
    if types:
        found["token_types.weight"] = [2, N_EMBD]
    for layer, more in enumerate(layers):
        block = f"blk.{layer}"
        found |= attention(block, bias, joined) | normed(f"{block}.attn_output_norm")
        found |= {f"{block}.{name}": shape for name, shape in more.items()} | normed(f"{block}.layer_output_norm")
    return found


def plain(n_ff: int = N_FF, up: int | None = None, *, gate: bool = False, bias: bool = True) -> Shapes:
    found = matrix("ffn_up", up or n_ff, N_EMBD, bias) | matrix("ffn_down", N_EMBD, n_ff, bias)
    return found | (matrix("ffn_gate", n_ff, N_EMBD, False) if gate else {})


def decoder(kv: int, *, qk_norm: int = 0, bias: bool = False, four: bool = False, gated: bool = True) -> Shapes:
    found: Shapes = {"token_embd.weight": [N_VOCAB, N_EMBD], **normed("output_norm", bias=False)}
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        found |= normed(f"{block}.attn_norm", bias=False) | attention(block, bias, kv=kv)
        found |= normed(f"{block}.ffn_norm", bias=False)
        found |= {f"{block}.{name}": shape for name, shape in plain(gate=gated, bias=False).items()}
        if qk_norm:
            found |= normed(f"{block}.attn_q_norm", qk_norm, False) | normed(f"{block}.attn_k_norm", qk_norm, False)
        if four:
            found |= normed(f"{block}.post_attention_norm", bias=False)
            found |= normed(f"{block}.post_ffw_norm", bias=False)
    return found


EXPERTS: Shapes = {
    "ffn_gate_inp.weight": [4, N_EMBD], "ffn_up_exps.weight": [4, N_FF, N_EMBD],
    "ffn_down_exps.weight": [4, N_EMBD, N_FF],
}  # fmt: skip
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}
RMS_NORM = {"attention.layer_norm_rms_epsilon": 1e-6}
GEMMA = {"pooling_type": 1, "attention.sliding_window": 9, "attention.head_count_kv": 1,
         "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6}  # fmt: skip


def modern(n_layer: int) -> Shapes:
    found: Shapes = {"token_embd.weight": [N_VOCAB, N_EMBD], **normed("token_embd_norm", bias=False),
                     **normed("output_norm", bias=False)}  # fmt: skip
    for layer in range(n_layer):
        block = f"blk.{layer}"
        found |= normed(f"{block}.attn_norm", bias=False) if layer else {}
        found |= attention(block, False, joined=True) | normed(f"{block}.ffn_norm", bias=False)
        found |= {f"{block}.{name}": shape for name, shape in plain(up=2 * N_FF, bias=False).items()}
    return found


def neo() -> Shapes:
    found: Shapes = {"token_embd.weight": [N_VOCAB, N_EMBD], **normed("enc.output_norm", bias=False)}
    for layer in range(N_LAYER):
        block = f"blk.{layer}"
        found |= normed(f"{block}.attn_norm", bias=False) | attention(block, False, joined=True)
        found |= normed(f"{block}.ffn_norm", bias=False)
        found |= {f"{block}.{name}": shape for name, shape in plain(up=2 * N_FF, bias=False).items()}
    return found


T5 = {"attention.relative_buckets_count": 32}


def t5(half: str, n_layer: int, *, gated: bool = True, inner: int = N_EMBD, own: bool = False) -> Shapes:
    """One half of a T5. own: each layer has biases of its own."""
    found: Shapes = {"token_embd.weight": [N_VOCAB, N_EMBD], f"{half}.output_norm.weight": [N_EMBD]}
    for layer in range(n_layer):
        block = f"{half}.blk.{layer}"
        for part in ("attn", *(("cross_attn",) if half == "dec" else ())):
            found |= normed(f"{block}.{part}_norm", bias=False) | matrix(f"{block}.{part}_o", N_EMBD, inner, False)
            for name in "qkv":
                found |= matrix(f"{block}.{part}_{name}", inner, N_EMBD, False)
        if own or not layer:
            found[f"{block}.attn_rel_b.weight"] = [32, N_HEADS]
        found |= normed(f"{block}.ffn_norm", bias=False)
        found |= {f"{block}.{name}": shape for name, shape in plain(gate=gated, bias=False).items()}
    return found


def classifier(n: int = 1) -> Shapes:
    return matrix("cls", N_EMBD, N_EMBD) | matrix("cls.output", n, N_EMBD)


def sketches() -> dict[str, dict[str, Any]]:
    """architecture, metadata, tensors and the poolings to compare, by name."""
    positions: Shapes = {"position_embd.weight": [64, N_EMBD]}
    biased = [plain()] * N_LAYER
    qk_norm = normed("attn_q_norm") | normed("attn_k_norm")
    down: Shapes = {"ffn_down.bias": [N_EMBD]}
    head = {"attention.key_length": 16, "attention.value_length": 16}
    return {
        "bert": ("bert", LAYER_NORM | {"pooling_type": 2}, bert(biased) | positions, [1, 2, 3]),
        "bert-joined": ("bert", LAYER_NORM | {"pooling_type": 1}, bert(biased, joined=True, types=False) | positions,
                        [1]),
        "bert-reranker": ("bert", LAYER_NORM | {"pooling_type": 4}, bert(biased) | positions | classifier(), [4]),
        "bert-classifier": ("bert", LAYER_NORM | {"pooling_type": 4},
                            bert(biased) | positions | matrix("cls.output", 1, N_EMBD), [4]),
        "nomic-bert": ("nomic-bert", LAYER_NORM | {"pooling_type": 1, "rope.freq_base": 1000.0},
                       bert([plain(gate=True, bias=False)] * N_LAYER, bias=False, joined=True), [1]),
        "nomic-bert-moe": ("nomic-bert-moe", LAYER_NORM | {"pooling_type": 1, "moe_every_n_layers": 2,
                           "expert_count": 4, "expert_used_count": 2},
                           bert([plain(), EXPERTS, plain()], joined=True), [1]),
        "jina-bert-v2": ("jina-bert-v2", LAYER_NORM | {"pooling_type": 1},
                         bert([plain(gate=True, bias=False) | down | qk_norm] * N_LAYER), [1]),
        "jina-bert-v2-joined": ("jina-bert-v2", LAYER_NORM | {"pooling_type": 1},
                                bert([plain(up=2 * N_FF, bias=False) | down | normed("attn_norm_2")] * N_LAYER), [1]),
        "jina-bert-v2-reranker": ("jina-bert-v2", LAYER_NORM | {"pooling_type": 4},
                                  bert([plain(up=2 * N_FF, bias=False) | down] * N_LAYER) | matrix("cls", 1, N_EMBD),
                                  [4]),
        "jina-bert-v3": ("jina-bert-v3", LAYER_NORM | {"pooling_type": 1, "rope.freq_base": 20000.0}, bert(biased),
                         [1]),
        "modern-bert": ("modern-bert", LAYER_NORM | {"pooling_type": 2, "attention.sliding_window": 10,
                        "rope.freq_base": 160000.0, "rope.freq_base_swa": 5000.0}, modern(4), [1, 2]),
        "modern-bert-reranker": ("modern-bert", LAYER_NORM | {"pooling_type": 4, "attention.sliding_window": 7,
                                 "hidden_activation": "silu"},
                                 modern(3) | matrix("cls", N_EMBD, N_EMBD, False)
                                 | matrix("cls.output", 1, N_EMBD) | normed("cls.norm", bias=False), [4]),
        "neo-bert": ("neo-bert", RMS_NORM | {"pooling_type": 2}, neo(), [2]),
        "eurobert": ("eurobert", RMS_NORM | {"pooling_type": 1}, decoder(N_EMBD), [1]),
        "gemma-embedding": ("gemma-embedding", RMS_NORM | head | GEMMA,
                            decoder(16, qk_norm=16, four=True), [1]),
        "gemma-embedding-dense": ("gemma-embedding", RMS_NORM | head | GEMMA | {"dense_2_feat_in": N_EMBD,
                                  "dense_2_feat_out": 64, "dense_3_feat_in": 64, "dense_3_feat_out": N_EMBD},
                                  decoder(16, qk_norm=16, four=True) | {"dense_2.weight": [64, N_EMBD],
                                  "dense_3.weight": [N_EMBD, 64]}, [1]),
        "t5encoder": ("t5encoder", RMS_NORM | T5, t5("enc", 2, gated=False), [1, 3]),
        "t5encoder-gated": ("t5encoder", RMS_NORM | T5 | {"attention.key_length": 8, "attention.value_length": 8},
                            t5("enc", 2, inner=24), [1]),
        "llama-embed": ("llama-embed", RMS_NORM | {"pooling_type": 1, "attention.head_count_kv": 1}, decoder(16), [1]),
        "llama-both-ways": ("llama", RMS_NORM | {"pooling_type": 1, "attention.causal": False}, decoder(N_EMBD), [1]),
        "qwen3-embedding": ("qwen3", RMS_NORM | {"pooling_type": 3}, decoder(N_EMBD, qk_norm=16), [1, 2, 3]),
        "qwen3-reranker": ("qwen3", RMS_NORM | {"pooling_type": 4}, decoder(N_EMBD, qk_norm=16)
                           | matrix("cls.output", 2, N_EMBD, False), [4]),
    }  # type: ignore[return-value]  # fmt: skip


def write(path: Path, sketch: dict[str, Any]) -> None:
    """The model of a sketch as a file that the reference engine takes."""
    reader, architecture = model(sketch), sketch["architecture"]
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.architecture", architecture, ValueType.STRING)
        writer.set_metadata("tokenizer.ggml.model", "no_vocab", ValueType.STRING)
        writer.set_metadata("tokenizer.ggml.token_type_count", 2, ValueType.UINT32)
        writer.set_metadata(f"{architecture}.vocab_size", N_VOCAB, ValueType.UINT32)
        if "cls.output.weight" in sketch["tensors"]:
            labels = [f"LABEL_{i}" for i in range(sketch["tensors"]["cls.output.weight"][0])]
            key = f"{architecture}.classifier.output_labels"
            writer.set_metadata(key, labels, ValueType.ARRAY, ValueType.STRING)
        kinds = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}
        for key, value in sketch["metadata"].items():
            writer.set_metadata(key, value, kinds[type(value)])
        for name, tensor in reader.tensors.items():
            writer.add_tensor(name, TensorType.F32, tensor.shape)
        for name, tensor in reader.tensors.items():
            writer.write_tensor(name, np.ascontiguousarray(tensor.raw))


def main() -> None:
    """Write the file."""
    made = {}
    for name, (architecture, metadata, tensors, poolings) in sketches().items():
        given = {
            "context_length": 64, "embedding_length": N_EMBD, "feed_forward_length": N_FF,
            "block_count": len({int(part) for key in tensors for part in key.split(".") if part.isdecimal()}),
            "attention.head_count": N_HEADS, "attention.causal": architecture == "qwen3", **metadata,
        }  # fmt: skip
        sketch: dict[str, Any] = {
            "architecture": architecture, "metadata": {f"{architecture}.{key}": value for key, value in given.items()},
            "tensors": tensors,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            file, out = Path(folder, "model.gguf"), Path(folder, "out.f32")
            write(file, sketch)

            def embedded(pooling: int, file: Path = file, out: Path = out) -> np.ndarray:
                tokens = map(str, TOKENS)
                subprocess.run([sys.argv[1], file, out, str(pooling), *tokens], check=True, stdout=subprocess.DEVNULL)
                return np.fromfile(out, np.float32)

            pooled = {str(pooling): [round(float(x), 6) for x in embedded(pooling)[:8]] for pooling in poolings}
            if architecture not in ("qwen3", "llama"):  # those make no embeddings by themselves
                if "dense_2.weight" not in tensors:  # else the reference engine's rows have gone through that
                    rows = forward(build_graph(model(sketch), 64), TOKENS)
                    assert error(rows, embedded(0).reshape(rows.shape)) <= 1e-6, name
                sketch["logits"] = some_logits(model(sketch))
            sketch["pooled"] = pooled
        made[name] = sketch
        print(name, sketch.get("logits"), pooled)
    lines = (f"{json.dumps(name)}: {json.dumps(sketch)}" for name, sketch in sorted(made.items()))
    EMBEDDERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
