"""Makes tests/data/huggingface: tiny random checkpoints, as Transformers saves them, with their logits and token ids.

    python tests/data/make_huggingface.py [FOLDER] [SEED]

It needs torch, transformers, tokenizers and sentencepiece, which neither qrun nor its tests do: what it makes is kept.
Each folder is a checkpoint, with two files more: reference.npz (tokens, logits in float32) and texts.json (texts with
their token ids). huggingface_windows.npz, beside the folders, has the logits of some of them with windows shorter than
the text, and the changes of config.json that say so. `make_huggingface.py windows` makes that alone, of the folders
that are there.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
DEFAULT_SEED = 20240
N_TOKENS = 18
LEAST_MARGIN = 0.02
"""By so much a router prefers each of the experts that it chooses to any other: more than rounding the cache to float16
changes."""

CORPUS = [part.strip() for part in (HERE / "tokenizer" / "llama-bpe.inp").read_text().split("__ggml_vocab_test__")]
TEXTS = [
    "Hello, world! It's 12345 o'clock.",
    " leading and  double   spaces",
    "Grüße, 世界 🌍 naïve\n\n\ttabs\r\nend ",
    "def f(x):\n    return x ** 2  # don't\n",
    "",
    "1 22 333 4444 55555 a1b2",
]

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}  # fmt: skip
NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"num_attention_heads": 2,
               "num_key_value_heads": 1}  # so that a head is 32 / 2 = 16 wide
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "long_factor": [1.5, 2.0, 3.0, 5.0, 7.0, 7.5], "short_factor": [1.0, 1.1, 1.15, 1.2, 1.3, 1.5],
            "original_max_position_embeddings": 16}  # fmt: skip

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


# Tokenizers


def byte_pair(
    folder: Path, steps: list[pre_tokenizers.PreTokenizer], special: list[str], bos: str | None = None, **options: bool
) -> None:
    """A byte-level tokenizer, as of GPT-2."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    steps_after: list[object] = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps_after.append(processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        ))  # fmt: skip
    tokenizer.post_processor = processors.Sequence(steps_after)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=special[-1], chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False))  # a third of the size


def llama3(folder: Path) -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    byte_pair(folder, [_split(LLAMA3), _bytes()], special, special[0], ignore_merges=True)


def qwen(folder: Path) -> None:
    byte_pair(folder, [_split(QWEN2), _bytes()], CHATML)


def smollm(folder: Path) -> None:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    byte_pair(folder, steps, CHATML)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def pieces(folder: Path, kind: str, keep_model: bool = True, add_bos: bool = True, **options: object) -> None:
    """A SentencePiece tokenizer. keep_model: with tokenizer.model; otherwise as tokenizer.json alone."""
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus.txt"
        lines = [line for part in CORPUS for line in part.splitlines() if line.strip()]
        corpus.write_text("\n".join("".join(c for c in line if c < "\u0250") for line in lines))
        settings = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1} | options
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(Path(temporary) / "tokenizer"), model_type="bpe", vocab_size=430,
            byte_fallback=True, split_digits=True, character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2, **settings,
        )  # fmt: skip
        model = Path(temporary) / "tokenizer.model"
        tokenizer = getattr(transformers, kind).from_pretrained(temporary, add_bos_token=add_bos)
        tokenizer.save_pretrained(folder)
        if keep_model:
            shutil.copy(model, folder / "tokenizer.model")
    if kind == "LlamaTokenizer":
        add_space_everywhere(folder / "tokenizer.json")


def add_space_everywhere(path: Path) -> None:
    """A space at the start of every text and after every special token: so it is in all files of Llama 2 and its kin,
    and in llama.cpp, whereas Transformers of today would save another rule."""
    tokenizer = json.loads(path.read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    tokenizer["pre_tokenizer"] = None
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def spm(folder: Path) -> None:
    pieces(folder, "LlamaTokenizer")


def spm_json(folder: Path) -> None:
    pieces(folder, "LlamaTokenizer", keep_model=False, add_bos=False)


GEMMA_IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>",
             "bos_piece": "<bos>", "add_dummy_prefix": False,
             "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁"]}  # fmt: skip


def gemma(folder: Path) -> None:
    pieces(folder, "GemmaTokenizer", **GEMMA_IDS)


def gemma_json(folder: Path) -> None:
    pieces(folder, "GemmaTokenizer", keep_model=False, **GEMMA_IDS)


# Models

Case = tuple[str, Callable[[Path], None], dict[str, object], str]
# Folder -> (class, tokenizer, configuration, type that it is saved as).
CASES: dict[str, Case] = {
    "llama": ("Llama", llama3, SIZES | {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
              "bfloat16"),
    "smollm2": ("Llama", smollm, NO_HEAD_DIM | {"tie_word_embeddings": True}, "float32"),
    "mistral": ("Mistral", spm, SIZES | {"sliding_window": None}, "float16"),
    "mixtral": ("Mixtral", spm_json, SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, "bfloat16"),
    "qwen2": ("Qwen2", qwen, NO_HEAD_DIM, "bfloat16"),
    "qwen3": ("Qwen3", qwen, SIZES | {"tie_word_embeddings": True}, "bfloat16"),
    "qwen3moe": ("Qwen3Moe", qwen, SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                            "norm_topk_prob": True}, "bfloat16"),
    "gemma": ("Gemma", gemma, SIZES, "bfloat16"),
    "gemma2": ("Gemma2", gemma_json, SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 16}, "bfloat16"),
    "gemma3": ("Gemma3", gemma, SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
               "bfloat16"),
    "gemma3-vision": ("Gemma3", gemma_json, SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 16,
                      "layer_types": ["sliding_attention", "full_attention"]}, "bfloat16"),
    "phi": ("Phi3", spm, NO_HEAD_DIM | {"pad_token_id": 0, "eos_token_id": 2}, "bfloat16"),
    "phi-longrope": ("Phi3", smollm, NO_HEAD_DIM | {"rope_parameters": LONGROPE, "pad_token_id": 0,
                                                 "original_max_position_embeddings": 16}, "bfloat16"),
    "smollm3": ("SmolLM3", llama3, NO_HEAD_DIM | {"num_hidden_layers": 4, "pad_token_id": 0},
                "bfloat16"),
}  # fmt: skip
SHARDED = "llama"  # saved in several files

LATER = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "layer_types": None}
EARLIER = LATER | {"layer_types": ["sliding_attention", "full_attention"]}
# Folder and case -> changes of config.json.
WINDOWS: dict[str, dict[str, object]] = {
    "mistral all": {"sliding_window": 6},
    "mixtral all": {"sliding_window": 6},
    "qwen2 later": LATER,
    "qwen2 named": EARLIER,
    "qwen3 named": EARLIER,
    "qwen3moe all": {"use_sliding_window": True, "sliding_window": 6},
    "phi all": {"sliding_window": 6},
    "smollm3 some": {"use_sliding_window": True, "sliding_window": 6, "layer_types": None},
}


def make(name: str, folder: Path) -> None:
    """One checkpoint. Random numbers come from torch's generator."""
    kind, make_tokenizer, settings, dtype = CASES[name]
    folder.mkdir(parents=True)
    make_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = settings | {"vocab_size": len(tokenizer)}
    for part in ("bos", "eos", "pad"):
        settings.setdefault(f"{part}_token_id", getattr(tokenizer, f"{part}_token_id"))
    model = vision_model(settings) if name.endswith("-vision") else text_model(kind, settings)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            values = random_values(parameter_name, parameter, shifted=kind.startswith("Gemma"))
            parameter.copy_(values.to(getattr(torch, dtype)))
    model.eval()
    # The logits come before the model is cast: that would round its tables for rope too, which no file holds.
    tokens = random_tokens(model, settings["vocab_size"])
    with torch.no_grad():
        reference = {"tokens": tokens[0].numpy().astype(np.int32), "logits": model(tokens).logits[0].numpy()}
        if name == "phi-longrope":
            reference["short_logits"] = model(tokens[:, :12]).logits[0].numpy()
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "1GB")
    np.savez_compressed(folder / "reference.npz", **{k: v for k, v in reference.items()})
    texts = [*TEXTS, *(f"a{token}b {token} c" for token in tokenizer.all_special_tokens if "▁" not in token)]
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = [{"text": text, "ids": encoder.encode(text).ids} for text in texts]
    (folder / "texts.json").write_text(json.dumps(pairs, indent=0))


def text_model(kind: str, settings: dict[str, object]) -> torch.nn.Module:
    config_name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_name)(**settings, attn_implementation="eager")
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def vision_model(settings: dict[str, object]) -> torch.nn.Module:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=settings, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager"
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def random_values(name: str, parameter: torch.Tensor, *, shifted: bool) -> torch.Tensor:
    """Large enough that an error anywhere is seen in the logits."""
    if parameter.dim() > 1:
        return 0.7 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    norm = "norm" in name and not shifted
    return torch.randn_like(parameter) * 0.2 + (1.0 if norm else 0.0)


def random_tokens(model: torch.nn.Module, n_vocab: int) -> torch.Tensor:
    """Some that no router is undecided about: else an error of a thousandth would choose another expert."""
    while True:
        tokens = torch.randint(0, n_vocab, (1, N_TOKENS))
        if router_margin(model, tokens) >= LEAST_MARGIN:
            return tokens


def router_margin(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """By how much the last expert that is chosen is ahead of the first that is not, at least."""
    n_used = getattr(model.config, "num_experts_per_tok", None)
    if n_used is None:
        return float("inf")
    with torch.no_grad():
        best = torch.cat(model(tokens, output_router_logits=True).router_logits).topk(n_used + 1).values
    return float((best[:, -2] - best[:, -1]).min())


def make_windows(folders: Path, out: Path) -> None:
    arrays = {}
    for case, changes in WINDOWS.items():
        source = folders / case.split()[0]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(shutil.copytree(source, Path(temporary) / "model"))
            config = json.loads((folder / "config.json").read_text()) | changes
            (folder / "config.json").write_text(json.dumps(config))
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        tokens = torch.tensor(np.load(source / "reference.npz")["tokens"][None].astype(np.int64))
        with torch.no_grad():
            arrays[case] = model(tokens).logits[0].numpy()
        arrays[f"{case}: changes"] = np.array(json.dumps(changes))
    np.savez_compressed(out, **arrays)


def main() -> None:
    if sys.argv[1:] == ["windows"]:
        make_windows(HERE / "huggingface", HERE / "huggingface_windows.npz")
        return
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "huggingface"
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT_SEED
    torch.manual_seed(seed)
    random.seed(seed)
    for name in CASES:
        shutil.rmtree(target / name, ignore_errors=True)
        make(name, target / name)
    make_windows(target, target.with_name(f"{target.name}_windows.npz"))


if __name__ == "__main__":
    main()
