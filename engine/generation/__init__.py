"""Generating texts: sessions, their caches and files, and the loop from a prompt to pieces."""
