"""Checkpoints as Hugging Face's Transformers library saves them, and what they are as GGUF files."""

from qrun.models.huggingface.checkpoint import CONFIG_NAME, CheckpointSource, read_config

__all__ = ["CONFIG_NAME", "CheckpointSource", "read_config"]
