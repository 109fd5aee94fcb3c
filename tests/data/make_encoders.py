"""Makes tests/data/encoders: tiny random checkpoints of models for embeddings, as Transformers saves them, with token
ids and vectors of some texts.

    python tests/data/make_encoders.py

It needs torch and transformers.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

OUT = Path(__file__).parent / "encoders"
TEXTS = ["The cat sat on the mat, twice!", "Größe déjà vu  123", "日本 x"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 64}  # fmt: skip
MODULES = "sentence_transformers.models."


def word_pieces() -> tuple[Tokenizer, dict[str, str]]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), "the", "cat", "##at", "!", ",", "日"]
    made = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.add_special_tokens(special)
    return made, {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def unigrams() -> tuple[Tokenizer, dict[str, str]]:
    letters = string.ascii_letters + string.digits + ",.!"
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(letter, -5.0 - i / 100) for i, letter in enumerate(letters)]
    pieces += [("▁the", -4.0), ("cat", -6.0), ("at", -5.5), ("▁c", -4.5), ("<mask>", 0.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return made, {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                  "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}  # fmt: skip


def save(
    name: str, model: Any, tokenizer: tuple[Tokenizer, dict[str, str]], pooling: str = "",
    dense: tuple[tuple[int, int], ...] = (),
) -> None:  # fmt: skip
    """pooling: "cls" or "mean", of a folder with the files of Sentence Transformers. dense: layers behind it."""
    made, named = tokenizer
    folder = OUT / name
    with torch.no_grad():
        for key, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.copy_(torch.randn_like(weights) * weights.shape[-1] ** -0.5)
            else:
                around = 1.0 if "norm" in key.lower() and key.endswith("weight") and name != "gemma" else 0.0
                weights.copy_(torch.randn_like(weights) * 0.3 + around)
    model.eval().save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    layers = []
    if pooling:
        modules = [{"path": "", "type": f"{MODULES}Transformer"}, {"path": "1_Pooling", "type": f"{MODULES}Pooling"}]
        (folder / "1_Pooling").mkdir(exist_ok=True)
        modes = {f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_tokens", "lasttoken", "max_tokens")}
        modes[{"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}[pooling]] = True
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        for number, (width, out) in enumerate(dense, 2):
            place = folder / f"{number}_Dense"
            place.mkdir(exist_ok=True)
            told = {"in_features": width, "out_features": out, "bias": False,
                    "activation_function": "torch.nn.modules.linear.Identity"}  # fmt: skip
            (place / "config.json").write_text(json.dumps(told))
            layers.append(torch.randn(out, width) * width**-0.5)
            save_file({"linear.weight": layers[-1]}, str(place / "model.safetensors"))
            modules.append({"path": place.name, "type": f"{MODULES}Dense"})
        (folder / "modules.json").write_text(json.dumps(modules))
    expected = {}
    with torch.no_grad():
        for text in TEXTS:
            ids = made.encode(text).ids
            output = model(torch.tensor([ids]))
            if hasattr(output, "logits"):
                vector = output.logits[0]
            else:
                rows = output.last_hidden_state[0]
                vector = rows[0] if pooling == "cls" else rows.mean(0)
                for layer in layers:
                    vector = layer @ vector
            expected[text] = {"ids": ids, "vector": [round(float(number), 6) for number in vector]}
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False))


def main() -> None:
    torch.manual_seed(3)
    words, pieces = word_pieces(), unigrams()
    bert = {**SIZES, "hidden_act": "gelu_new", "vocab_size": words[0].get_vocab_size()}
    roberta = {**SIZES, "hidden_act": "gelu_new", "vocab_size": pieces[0].get_vocab_size(), "pad_token_id": 1,
               "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1, "max_position_embeddings": 66}  # fmt: skip
    t = transformers
    save("bert", t.BertModel(t.BertConfig(**bert)), words, "cls")
    save("bert-classifier", t.BertForSequenceClassification(t.BertConfig(num_labels=1, **bert)), words)
    save("xlm-roberta", t.XLMRobertaModel(t.XLMRobertaConfig(**roberta)), pieces, "mean")
    classifier = t.XLMRobertaForSequenceClassification(t.XLMRobertaConfig(num_labels=1, **roberta))
    save("xlm-roberta-classifier", classifier, pieces)
    ends = {"vocab_size": words[0].get_vocab_size(), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    modern = t.ModernBertConfig(**SIZES | ends | {
        "num_hidden_layers": 3, "local_attention": 8, "hidden_activation": "gelu_new", "cls_token_id": 2,
        "sep_token_id": 3})  # fmt: skip
    save("modern-bert", t.ModernBertModel(modern), words, "mean")
    gemma = t.Gemma3TextConfig(**SIZES | ends | {
        "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 12,
        "query_pre_attn_scalar": 8, "use_bidirectional_attention": True})  # fmt: skip
    save("gemma", t.Gemma3TextModel(gemma), words, "mean", ((16, 20), (20, 16)))


if __name__ == "__main__":
    main()
