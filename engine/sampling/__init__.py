"""Choosing a token from logits."""
