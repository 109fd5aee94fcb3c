"""Vectors of texts, and how well texts go together."""
