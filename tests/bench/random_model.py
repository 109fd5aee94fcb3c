"""Writes a model of a billion random weights, in any type: for speed, what the weights say does not matter.

    python tests/bench/random_model.py q4_k_m llama-1b-q4_k_m.gguf
    python tests/bench/random_model.py q5_0 llama-1b-q5_0.gguf
    python tests/bench/random_model.py q4_k_m nemotron_h-q4_k_m.gguf --architecture nemotron_h

`q4_k_m` is the mix of llama-quantize; any other type is that of all matrices. There is no tokenizer in the file. What
an architecture's model looks like is said in ARCHITECTURES.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qrun.engine.quantize.mixes import Choice, Facts, choose_types, file_type_name, is_quantisable
from qrun.formats import GGUFWriter, TensorType, ValueType, dequantize
from qrun.formats.blocks import BLOCK_FORMATS, nvfp4

# Where a block's float16 scale lies; and its minimum, as a multiple of the scale that makes the weights' mean zero.
SCALES = {
    "Q4_0": 0, "Q4_1": 0, "Q5_0": 0, "Q5_1": 0, "Q8_0": 0, "Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208,
    "IQ4_NL": 0, "IQ4_XS": 0, "IQ1_S": 0, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "TQ1_0": 52,
    "TQ2_0": 64, "Q1_0": 0, "Q2_0": 0,
}  # fmt: skip
# The types of all matrices that there can be: those, and two whose scales lie elsewhere.
QUANTISED = [*SCALES, "IQ1_M", "NVFP4"]
MINIMUMS = {"Q4_1": (2, -7.5), "Q5_1": (2, -15.5), "Q2_K": (82, 1.5), "Q4_K": (2, 7.5), "Q5_K": (2, 15.5)}
MIX = "Q4_K_M"


@dataclass(frozen=True)
class Description:
    """A model: metadata without the architecture's name before the keys, and the shapes of all tensors by name."""

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    experts: TensorType | None = None
    """What the matrices of experts are in any mix, as they were trained."""

    @property
    def n_weights(self) -> int:
        """How many weights there are."""
        return sum(int(np.prod(shape)) for shape in self.tensors.values())

    def types(self, mix: str) -> dict[str, TensorType]:
        """The type of each tensor. mix: "Q4_K_M", or the name of a TensorType."""
        named = {f"{self.architecture}.{key}": value for key, value in self.metadata.items()}
        facts = Facts.of(named | {"general.architecture": self.architecture}, has_importance=False)
        floats = {name: (TensorType.F32, shape) for name, shape in self.tensors.items()}
        types = choose_types(floats, facts, Choice(file_type_name(mix), pure=mix != MIX))
        if self.experts is not None:
            types |= {name: self.experts for name in types if name.endswith("_exps.weight")}
        return types


def llama(
    *, layers: int = 16, width: int = 2048, ffn: int = 8192, heads: int = 32, kv_heads: int = 8,
    vocabulary: int = 128_256,
) -> Description:  # fmt: skip
    """By default Llama 3.2 1B, whose head is its embedding."""
    dim = width // heads
    tensors = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    for i in range(layers):
        block = norms(width, "attn_norm", "ffn_norm") | attention(width, heads, kv_heads, dim) | network(width, ffn)
        tensors |= prefixed(i, block)
    metadata = sizes(layers, width, heads, kv_heads, dim, vocabulary) | {"feed_forward_length": ffn}
    return Description("llama", metadata | {"rope.dimension_count": dim, "rope.freq_base": 500_000.0}, tensors)


def qwen35(
    *, layers: int = 24, width: int = 1024, ffn: int = 3584, heads: int = 8, kv_heads: int = 2, dim: int = 256,
    state_heads: int = 16, key_heads: int = 16, state: int = 128, vocabulary: int = 248_320,
) -> Description:  # fmt: skip
    """By default Qwen 3.5 0.8B: three gated delta nets, then attention."""
    tensors = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    inner, keys = state_heads * state, key_heads * state
    for i in range(layers):
        block = norms(width, "attn_norm", "post_attention_norm") | network(width, ffn)
        if (i + 1) % 4:
            block |= {
                "attn_qkv.weight": (2 * keys + inner, width), "attn_gate.weight": (inner, width),
                "ssm_beta.weight": (state_heads, width), "ssm_alpha.weight": (state_heads, width),
                "ssm_dt.bias": (state_heads,), "ssm_a": (state_heads,), "ssm_conv1d.weight": (2 * keys + inner, 4),
                "ssm_norm.weight": (state,), "ssm_out.weight": (width, inner),
            }  # fmt: skip
        else:
            block |= attention(width, heads, kv_heads, dim) | norms(dim, "attn_q_norm", "attn_k_norm")
            block["attn_q.weight"] = (2 * heads * dim, width)  # with a gate for each head
        tensors |= prefixed(i, block)
    metadata = sizes(layers, width, heads, kv_heads, dim, vocabulary) | {
        "feed_forward_length": ffn, "rope.dimension_count": dim // 4, "rope.freq_base": 1e7,
        "rope.dimension_sections": [dim // 24, dim // 24, dim // 8 - 2 * (dim // 24), 0],
        "full_attention_interval": 4, "ssm.conv_kernel": 4, "ssm.state_size": state, "ssm.group_count": key_heads,
        "ssm.time_step_rank": state_heads, "ssm.inner_size": inner,
    }  # fmt: skip
    return Description("qwen35", metadata, tensors)


def nemotron_h(
    *, pattern: str = "M-M-M-M*-M-M-M-M*-M-M-M-M-M-", width: int = 2048, ffn: int = 7168, heads: int = 16,
    kv_heads: int = 4, dim: int = 128, state_heads: int = 64, state_dim: int = 64, groups: int = 8, state: int = 128,
    vocabulary: int = 131_072,
) -> Description:  # fmt: skip
    """Nemotron Nano 2 made smaller: each layer is a Mamba-2 mixer (M), attention (*) or a feed-forward network (-)."""
    tensors = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    for i, kind in enumerate(pattern):
        block = norms(width, "attn_norm")
        if kind == "M":
            block |= mamba2_mixer(width, state_heads, state_dim, groups, state)
        elif kind == "*":
            block |= attention(width, heads, kv_heads, dim)
        else:
            block |= {"ffn_up.weight": (ffn, width), "ffn_down.weight": (width, ffn)}
        tensors |= prefixed(i, block)
    with_heads = [kv_heads if kind == "*" else 0 for kind in pattern]
    with_network = [ffn if kind == "-" else 0 for kind in pattern]
    metadata = sizes(len(pattern), width, heads, with_heads, dim, vocabulary) | {
        "feed_forward_length": with_network, "attention.layer_norm_epsilon": 1e-5,
        **mamba2_sizes(state_heads, state_dim, groups, state),
    }  # fmt: skip
    return Description("nemotron_h", metadata, tensors)


def mamba2(
    *, layers: int = 48, width: int = 1536, state_dim: int = 64, groups: int = 1, state: int = 128,
    vocabulary: int = 50_288,
) -> Description:  # fmt: skip
    """By default Mamba-2 780M."""
    heads = 2 * width // state_dim
    tensors = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    for i in range(layers):
        tensors |= prefixed(i, norms(width, "attn_norm") | mamba2_mixer(width, heads, state_dim, groups, state))
    metadata = {
        "context_length": 131_072, "embedding_length": width, "block_count": layers, "feed_forward_length": 0,
        "attention.head_count": 0, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": vocabulary,
        **mamba2_sizes(heads, state_dim, groups, state),
    }  # fmt: skip
    return Description("mamba2", metadata, tensors)


def mamba(*, layers: int = 48, width: int = 1536, state: int = 16, vocabulary: int = 50_280) -> Description:
    """By default Mamba 790M."""
    inner, rank = 2 * width, width // 16
    tensors = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    for i in range(layers):
        block = norms(width, "attn_norm") | {
            "ssm_in.weight": (2 * inner, width), "ssm_conv1d.weight": (inner, 4), "ssm_conv1d.bias": (inner,),
            "ssm_x.weight": (rank + 2 * state, inner), "ssm_dt.weight": (inner, rank), "ssm_dt.bias": (inner,),
            "ssm_a": (inner, state), "ssm_d": (inner,), "ssm_out.weight": (width, inner),
        }  # fmt: skip
        tensors |= prefixed(i, block)
    metadata = {
        "context_length": 131_072, "embedding_length": width, "block_count": layers, "feed_forward_length": 0,
        "attention.head_count": 0, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": vocabulary,
        "ssm.conv_kernel": 4, "ssm.state_size": state, "ssm.time_step_rank": rank, "ssm.inner_size": inner,
    }  # fmt: skip
    return Description("mamba", metadata, tensors)


def gpt_oss(
    *, layers: int = 8, width: int = 1536, ffn: int = 1536, heads: int = 32, kv_heads: int = 8, dim: int = 64,
    experts: int = 16, used: int = 4, vocabulary: int = 65_536,
) -> Description:  # fmt: skip
    """gpt-oss made smaller: windows on every other layer, sinks, experts with biases in MXFP4."""
    tensors = {
        "token_embd.weight": (vocabulary, width), "output_norm.weight": (width,), "output.weight": (vocabulary, width),
    }  # fmt: skip
    for i in range(layers):
        block = norms(width, "attn_norm", "post_attention_norm") | attention(width, heads, kv_heads, dim)
        block |= {name.replace("weight", "bias"): shape[:1] for name, shape in block.items() if "attn_" in name}
        block = {name: shape for name, shape in block.items() if "norm.bias" not in name}
        block |= {
            "attn_sinks.weight": (heads,), "ffn_gate_inp.weight": (experts, width), "ffn_gate_inp.bias": (experts,),
            "ffn_gate_exps.weight": (experts, ffn, width), "ffn_gate_exps.bias": (experts, ffn),
            "ffn_up_exps.weight": (experts, ffn, width), "ffn_up_exps.bias": (experts, ffn),
            "ffn_down_exps.weight": (experts, width, ffn), "ffn_down_exps.bias": (experts, width),
        }  # fmt: skip
        tensors |= prefixed(i, block)
    metadata = sizes(layers, width, heads, kv_heads, dim, vocabulary) | {
        "feed_forward_length": ffn, "expert_feed_forward_length": ffn, "expert_count": experts,
        "expert_used_count": used, "attention.sliding_window": 128, "rope.dimension_count": dim,
        "rope.freq_base": 150_000.0,
    }  # fmt: skip
    return Description("gpt-oss", metadata, tensors, TensorType.MXFP4)


def gemma4(
    *, layers: int = 12, width: int = 1536, ffn: int = 6144, heads: int = 8, kv_heads: int = 4, dim: int = 256,
    vocabulary: int = 262_144,
) -> Description:  # fmt: skip
    """Gemma 4 12B made smaller: five layers of six see a window, the sixth has heads twice as wide and keys alone."""
    tensors = {
        "token_embd.weight": (vocabulary, width), "output_norm.weight": (width,), "rope_freqs.weight": (dim,),
    }  # fmt: skip
    sliding = [int((i + 1) % 6 > 0) for i in range(layers)]
    for i in range(layers):
        wide, heads_kv = (dim, kv_heads) if sliding[i] else (2 * dim, 1)
        names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        block = norms(width, *names) | norms(wide, "attn_q_norm", "attn_k_norm") | network(width, ffn)
        block |= attention(width, heads, heads_kv, wide) | {"layer_output_scale.weight": (1,)}
        if not sliding[i]:
            del block["attn_v.weight"]
        tensors |= prefixed(i, block)
    metadata = sizes(layers, width, heads, [kv_heads if one else 1 for one in sliding], 2 * dim, vocabulary) | {
        "feed_forward_length": ffn, "attention.sliding_window": 1024, "attention.sliding_window_pattern": sliding,
        "attention.key_length_swa": dim, "attention.value_length_swa": dim, "rope.dimension_count": 2 * dim,
        "rope.dimension_count_swa": dim, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0, "embedding_length_per_layer_input": 0, "attention.shared_kv_layers": 0,
    }  # fmt: skip
    return Description("gemma4", metadata, tensors)


def deepseek2(
    *, layers: int = 8, width: int = 1536, ffn: int = 6144, heads: int = 16, asked: int = 768, rank: int = 512,
    plain: int = 128, turned: int = 64, value: int = 128, expert_ffn: int = 768, experts: int = 24,
    used: int = 4, vocabulary: int = 102_400,
) -> Description:  # fmt: skip
    """DeepSeek V2 Lite and GLM-4.7-Flash made smaller: latent attention, small experts beside a shared one."""
    tensors = {
        "token_embd.weight": (vocabulary, width), "output_norm.weight": (width,), "output.weight": (vocabulary, width),
    }  # fmt: skip
    for i in range(layers):
        block = norms(width, "attn_norm", "ffn_norm") | norms(rank, "attn_kv_a_norm") | norms(asked, "attn_q_a_norm")
        block |= {
            "attn_q_a.weight": (asked, width), "attn_q_b.weight": (heads * (plain + turned), asked),
            "attn_kv_a_mqa.weight": (rank + turned, width), "attn_k_b.weight": (heads, rank, plain),
            "attn_v_b.weight": (heads, value, rank), "attn_output.weight": (width, heads * value),
        }  # fmt: skip
        if i == 0:
            block |= network(width, ffn)
        else:
            block |= {f"{name.removesuffix('.weight')}_shexp.weight": shape
                      for name, shape in network(width, expert_ffn).items()}  # fmt: skip
            block |= {f"{name.removesuffix('.weight')}_exps.weight": (experts, *shape)
                      for name, shape in network(width, expert_ffn).items()}  # fmt: skip
            block |= {"ffn_gate_inp.weight": (experts, width)}
        tensors |= prefixed(i, block)
    metadata = sizes(layers, width, heads, 1, rank + turned, vocabulary) | {
        "attention.value_length": rank, "attention.key_length_mla": plain + turned,
        "attention.value_length_mla": value, "attention.kv_lora_rank": rank, "attention.q_lora_rank": asked,
        "rope.dimension_count": turned, "rope.freq_base": 1e4, "feed_forward_length": ffn,
        "expert_feed_forward_length": expert_ffn, "leading_dense_block_count": 1, "expert_count": experts,
        "expert_used_count": used, "expert_shared_count": 1, "expert_weights_scale": 1.0,
    }  # fmt: skip
    return Description("deepseek2", metadata, tensors)


def deepseek32(
    *, index_heads: int = 8, index_dim: int = 128, chosen: int = 2048, asked: int = 768, **sizes: Any
) -> Description:
    """DeepSeek V3.2 made smaller: the same, and an index that chooses what long contexts are attended to."""
    model = deepseek2(asked=asked, **sizes)
    width = model.tensors["output_norm.weight"][0]
    tensors = dict(model.tensors)
    for i in range(model.metadata["block_count"]):
        tensors |= prefixed(i, {
            "indexer.attn_q_b.weight": (index_heads * index_dim, asked), "indexer.attn_k.weight": (index_dim, width),
            "indexer.k_norm.weight": (index_dim,), "indexer.k_norm.bias": (index_dim,),
            "indexer.proj.weight": (index_heads, width),
        })  # fmt: skip
    metadata = model.metadata | {
        "attention.indexer.head_count": index_heads, "attention.indexer.key_length": index_dim,
        "attention.indexer.top_k": chosen, "expert_gating_func": 2,
    }  # fmt: skip
    return Description("deepseek32", metadata, tensors)


ARCHITECTURES: dict[str, Callable[..., Description]] = {
    "llama": llama,
    "qwen35": qwen35,
    "nemotron_h": nemotron_h,
    "mamba2": mamba2,
    "mamba": mamba,
    "gpt-oss": gpt_oss,
    "gemma4": gemma4,
    "deepseek2": deepseek2,
    "deepseek32": deepseek32,
}


def prefixed(layer: int, block: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A block's tensors under their whole names."""
    return {f"blk.{layer}.{name}": shape for name, shape in block.items()}


def norms(width: int, *names: str) -> dict[str, tuple[int, ...]]:
    """The weights of norms."""
    return {f"{name}.weight": (width,) for name in names}


def attention(width: int, heads: int, kv_heads: int, dim: int) -> dict[str, tuple[int, ...]]:
    """The matrices of attention."""
    return {
        "attn_q.weight": (heads * dim, width), "attn_k.weight": (kv_heads * dim, width),
        "attn_v.weight": (kv_heads * dim, width), "attn_output.weight": (width, heads * dim),
    }  # fmt: skip


def network(width: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """The matrices of a gated feed-forward network."""
    return {"ffn_gate.weight": (ffn, width), "ffn_up.weight": (ffn, width), "ffn_down.weight": (width, ffn)}


def mamba2_mixer(width: int, heads: int, dim: int, groups: int, state: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Mamba-2 mixer."""
    inner, mixed = heads * dim, heads * dim + 2 * groups * state
    return {
        "ssm_in.weight": (inner + mixed + heads, width), "ssm_conv1d.weight": (mixed, 4), "ssm_conv1d.bias": (mixed,),
        "ssm_dt.bias": (heads,), "ssm_a": (heads, 1), "ssm_d": (heads, 1), "ssm_norm.weight": (groups, inner // groups),
        "ssm_out.weight": (width, inner),
    }  # fmt: skip


def mamba2_sizes(heads: int, dim: int, groups: int, state: int) -> dict[str, int]:
    """Their metadata."""
    return {
        "ssm.conv_kernel": 4, "ssm.state_size": state, "ssm.group_count": groups, "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * dim,
    }  # fmt: skip


def sizes(layers: int, width: int, heads: int, kv_heads: int | list[int], dim: int, vocabulary: int) -> dict[str, Any]:
    """The metadata that all models with attention have."""
    return {
        "context_length": 131_072, "embedding_length": width, "block_count": layers, "attention.head_count": heads,
        "attention.head_count_kv": kv_heads, "attention.key_length": dim, "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": vocabulary,
    }  # fmt: skip


def random_blocks(rng: np.random.Generator, type_: TensorType, n_weights: int, deviation: float) -> np.ndarray:
    """Bytes of random weights with mean near zero and that standard deviation: uint8 [n_bytes]."""
    layout, name = BLOCK_FORMATS[type_], type_.name
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal(n_weights, np.float32) * np.float32(deviation)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float32 if name == "F32" else np.float16).view(np.uint8)
    raw = np.frombuffer(rng.bytes(n_weights // layout.block_size * layout.block_bytes), np.uint8).copy()
    blocks = raw.reshape(-1, layout.block_bytes)
    if name in ("Q2_0", "TQ2_0"):  # of the four levels three are in use, the middle one twice as often
        blocks &= ~((blocks & blocks >> 1 & 0x55) << 1)

    def set_scale(scale: float) -> None:
        if name == "NVFP4":
            blocks[:, :4] = np.abs(nvfp4.SCALES[:127] - scale).argmin()
            return
        if name == "MXFP4":
            blocks[:, 0] = round(127 + np.log2(scale))
            return
        if name == "IQ1_M":
            quarters = np.float16(scale).view(np.uint16) >> np.arange(0, 16, 4) & 15
            blocks[:, 49::2] = blocks[:, 49::2] & 15 | quarters << 4
            return
        fields = [(SCALES[name], scale)]
        if name in MINIMUMS:
            place, factor = MINIMUMS[name]
            fields.append((place, scale * factor))
        for place, value in fields:
            blocks[:, place : place + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    # Scale 1 shows how far the quants spread.
    set_scale(1.0)
    sample = blocks[:256]
    spread = float(dequantize(sample.reshape(-1), type_, (sample.shape[0] * layout.block_size,)).std())
    set_scale(deviation / spread)
    return raw


def constants(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a trained model may have in a tensor that is no matrix: float32. States fade, and stay finite."""
    if "norm" in name or name.endswith(("ssm_d", "rope_freqs.weight", "layer_output_scale.weight")):
        return np.ones(shape, np.float32)
    if name.endswith("ssm_a"):
        of_heads = shape[-1] == 1 or len(shape) == 1
        values = rng.uniform(1, 16, shape) if of_heads else np.broadcast_to(np.arange(1, shape[-1] + 1), shape)
        return (-values).astype(np.float32)
    if name.endswith("ssm_dt.bias"):  # time steps of 0.001 to 0.1, before their softplus
        return np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), shape)))).astype(np.float32)
    if name.endswith(".bias"):
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    return (shape[-1] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)


def without_tokenizer(writer: GGUFWriter) -> None:
    """Say that there is none."""
    writer.set_metadata("tokenizer.ggml.model", "no_vocab", ValueType.STRING)


def write(
    path: Path, mix: str, model: Description, seed: int = 1,
    set_tokenizer: Callable[[GGUFWriter], None] = without_tokenizer,
) -> None:  # fmt: skip
    """Write the model. mix: "Q4_K_M", or the name of a TensorType."""
    rng = np.random.default_rng(seed)
    types = model.types(mix)
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.architecture", model.architecture, ValueType.STRING)
        writer.set_metadata("general.name", f"random {mix}", ValueType.STRING)
        for key, value in model.metadata.items():
            name = f"{model.architecture}.{key}"
            if isinstance(value, list):
                writer.set_metadata(name, value, ValueType.ARRAY, ValueType.INT32)
            elif isinstance(value, bool):
                writer.set_metadata(name, value, ValueType.BOOL)
            else:
                writer.set_metadata(name, value, ValueType.FLOAT32 if isinstance(value, float) else ValueType.UINT32)
        set_tokenizer(writer)
        for name, shape in model.tensors.items():
            writer.add_tensor(name, types[name], shape)
        for name, shape in model.tensors.items():
            if is_quantisable(name, shape, TensorType.F32):
                raw = random_blocks(rng, types[name], int(np.prod(shape)), shape[-1] ** -0.5)
            else:
                raw = constants(rng, name, shape).reshape(-1).view(np.uint8)
            writer.write_tensor(name, raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mix", type=str.upper, choices=[MIX, *QUANTISED, "F16", "BF16", "F32"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="llama")
    args = parser.parse_args()
    write(args.path, args.mix, ARCHITECTURES[args.architecture]())


if __name__ == "__main__":
    main()
