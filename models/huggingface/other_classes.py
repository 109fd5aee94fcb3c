"""What classes are that are not converted: a line for those who try one."""

from __future__ import annotations

from collections.abc import Iterable

from qrun.formats.gguf.cursor import quote
from qrun.models.support import alike

# By parts of their names, the first that fits. Those that can be converted all the same never come here.
OTHER_CLASSES = {
    "a drafter, which goes beside a model": ("DraftModel", "DSpark", "Eagle3", "Assistant", "Medusa", "MTPModel"),
    "a model that chooses among options, and writes no text": (
        "ClefModel", "KevModel", "LevModel", "NimbleModel", "OpenJevModel", "DecisionModel",
    ),
    "a model that writes images as well as text": ("Chameleon", "Emu3"),
    "a model that changes its adapters from token to token": ("GraniteSwitch",),
    "an encoder of sound: the text is written by a model that lies in a folder of its own": ("UltravoxModel",),
    "a model of audio": (
        "Whisper", "Wav2Vec2", "Hubert", "TTS", "AudioTokenizer", "WavTokenizer", "Bark", "Encodec", "MusicGen",
        "Musicgen", "SpeechT5", "SeamlessM4T", "Moonshine", "ParakeetFor", "CsmFor", "DiaFor",
    ),
    "a model of images": (
        "CLIP", "Siglip", "ViTFor", "ViTModel", "Dinov", "DINO", "SamModel", "Sam2Model", "SwinModel", "ConvNext",
        "ResNet", "Detr", "ImageClassification", "ObjectDetection", "ImageSegmentation", "DepthEstimation",
    ),
    "a model that labels tokens or finds answers in a text, and writes none": (
        "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
    ),
}  # fmt: skip


def class_problem(name: str, known: Iterable[str]) -> str:
    """What is wrong with a class that is not among those that are known: what it is, or which are called like it."""
    problem = f"architecture {quote(name)} is not supported"
    for what, parts in OTHER_CLASSES.items():
        if any(part in name for part in parts):
            return f"{problem}: it is {what}"
    return f"{problem} ({alike(name, known)})"
