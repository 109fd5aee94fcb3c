"""Which models can be converted: the classes that config.json names under "architectures", each with its entry.

Names and shapes are those of the Transformers library (modeling_*.py), or of the files that a model's makers publish;
the names in GGUF files those of llama.cpp (gguf-py/gguf/tensor_mapping.py). A new class is an entry in one of the files
of families/.
"""

from qrun.models.huggingface.families import (
    classic,
    deepseek,
    deepseek4,
    delta,
    encoders,
    gemma,
    glm,
    granite,
    latent,
    llama,
    mixtures,
    qwen,
    qwen4,
    rare,
    recurrent,
    rwkv,
    single,
    t5,
    various,
    windowed,
)
from qrun.models.huggingface.layout import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    **llama.CLASSES, **qwen.CLASSES, **gemma.CLASSES, **granite.CLASSES, **glm.CLASSES, **deepseek.CLASSES,
    **deepseek4.CLASSES, **delta.CLASSES,
    **recurrent.CLASSES, **mixtures.CLASSES, **classic.CLASSES, **various.CLASSES,
    **encoders.CLASSES, **rwkv.CLASSES, **t5.CLASSES, **single.CLASSES,
    **windowed.CLASSES, **latent.CLASSES, **qwen4.CLASSES,
    **rare.CLASSES,
}  # fmt: skip
"""By the class's name."""
