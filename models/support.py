"""What a GGUF file is, and what keeps it from being run: one wording for those who look at a file and who load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import IntEnum

from qrun.formats.blocks import BLOCK_FORMATS
from qrun.formats.dataclass import dataclass
from qrun.formats.gguf.cursor import quote
from qrun.formats.tensors import Described, TensorFile, text_of

EMBEDDERS = (
    "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert",
    "gemma-embedding", "llama-embed", "t5encoder",
)  # fmt: skip
"""Architectures without an output matrix, of whose rows embeddings are made. Tokens see those behind them, too, unless
the file says that they do not."""
DIFFUSION = ("dream", "llada", "llada-moe", "rnd1")
"""Architectures that fill in what is masked, in any order."""
CHOOSERS = (
    "deepseek32", "glm-dsa", "dots3note", "hy_v4", "glm5-next", "qwen4exp", "minimax-m3", "deepseek4",
)  # fmt: skip
"""Architectures that attend to chosen positions of a long context, and keep for that what a short one does without."""

# What architectures are that make no text one token after the other. Those that are supported all the same (see
# ARCHITECTURES) never come here.
NO_LANGUAGE_MODELS = {
    "a model that chooses among options, and writes no text": ("clef",),
    "a model that writes images as well as text": ("chameleon",),
    "a model that changes its adapters from token to token": ("graniteswitch",),
    "a drafter, which goes beside a model": ("gemma4-assistant", "eagle3", "dflash"),
    "a model of audio": ("wavtokenizer-dec", "qwen3tts", "pockettts", "whisper", "outetts"),
    "a model of images or video": (
        "flux", "sd1", "sd3", "sdxl", "qwen_image", "wan", "ltxv", "lumina2", "hidream", "cosmos", "hyvid", "aura",
    ),
}  # fmt: skip


class PoolingType(IntEnum):
    """What one vector is made of, of all rows of a text: the values of `pooling_type`."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4
    """Numbers that say how well two texts go together."""


@dataclass(frozen=True)
class Support:
    """Whether a file can be run here. kind: "model", or what it is instead. problem: why not, or None."""

    kind: str
    problem: str | None

    @property
    def runs(self) -> bool:
        """Can it be run, by itself?"""
        return self.problem is None


def purpose(file: TensorFile[Described]) -> str | None:
    """What a model is for that does not just write: for `qrun info`."""
    architecture = text_of(file, "general.architecture")
    pooling = file.metadata.get(f"{architecture}.pooling_type")
    pooling = pooling if isinstance(pooling, int) else None
    if pooling == PoolingType.RANK:
        return "reranking: it says how well texts answer a query"
    pooled = _POOLED.get(pooling)
    if architecture in EMBEDDERS or pooled:
        return "embeddings" + (f", by {pooled}" if pooled else "")
    if architecture == "t5":
        return "answers: it reads a prompt as a whole, and writes another text"
    return "text by diffusion: it fills in what is masked" if architecture in DIFFUSION else None


def predicts(file: TensorFile[Described]) -> bool:
    """Does a model predict each token from those before it, and nothing else? Not those that see a whole text."""
    architecture = text_of(file, "general.architecture")
    if architecture in (*EMBEDDERS, *DIFFUSION, "t5"):
        return False
    return file.metadata.get(f"{architecture}.attention.causal") is not False


_POOLED: dict[int | None, str] = {
    PoolingType.MEAN: "the mean of a text's rows",
    PoolingType.CLS: "the first row of a text",
    PoolingType.LAST: "the last row of a text",
}


def other_kind(file: TensorFile[Described]) -> Support | None:
    """What a file is that is no model; None of a model, even one that cannot be run."""
    metadata = file.metadata
    kind, architecture = text_of(file, "general.type"), text_of(file, "general.architecture")
    if kind == "adapter":
        return Support("adapter", "this is an adapter, not a model: name it after --lora, beside its model")
    if kind == "imatrix":
        return Support("importance matrix", "this is an importance matrix, not a model: name it after --imatrix")
    if architecture == "clip" or kind == "mmproj":
        parts = [what for what in ("vision", "audio") if metadata.get(f"clip.has_{what}_encoder") is True] or ["vision"]
        tower = " and ".join(parts) + " tower"
        article = "an" if tower.startswith("audio") else "a"
        return Support(tower, f"this is {article} {tower}: it goes beside a model, and cannot be run alone")
    if architecture == "controlvector":
        return Support("control vector", "this is a control vector, not a model: such are not supported")
    if not file.tensors and any(key.startswith("tokenizer.") for key in metadata):
        return Support("vocabulary", "this is a vocabulary alone: the file has no weights")
    return None


def architecture_problem(name: str, known: Iterable[str]) -> str | None:
    """What is wrong with a name of an architecture, if it is not among those that are known."""
    if name in known:
        return None
    what = next((what for what, names in NO_LANGUAGE_MODELS.items() if name in names), None)
    said = f"architecture {quote(name[:40])} is not supported"
    return f"{said}: it is {what}" if what else f"{said} ({alike(name, known)})"


def alike(name: str, known: Iterable[str]) -> str:
    """Which of the names that are known are written much like this one, or how many there are."""
    from difflib import get_close_matches

    known = list(known)
    close = get_close_matches(name, known, n=3, cutoff=0.85)
    return f"much like it: {', '.join(close)}" if close else f"{len(known)} others are"


def unsupported_types(tensors: Iterable[Described]) -> Counter[str]:
    """How many tensors there are of each type that cannot be decoded."""
    return Counter(tensor.type.name for tensor in tensors if tensor.type not in BLOCK_FORMATS)


def type_problem(tensor: Described, tensors: Iterable[Described]) -> str:
    """What is wrong with the type of a tensor, and how many more are like it."""
    counts = unsupported_types(tensors)
    reason = f"tensor {tensor.name} has type {tensor.type.name}, which is not supported"
    if counts.total() <= 1:
        return reason
    of_each = ", ".join(f"{count} of {name}" for name, count in counts.most_common())
    return f"{reason} (tensors of such types in all: {of_each})"
