"""Telling files apart without reading them whole."""

import os
from collections.abc import Iterator
from pathlib import Path

# Enough to tell a fine-tuned model from its origin (which has the same shapes and size, and other weights all over),
# little enough to take no time.
_N_SAMPLES = 64
_SAMPLE_BYTES = 4096


def samples(path: Path) -> Iterator[bytes]:
    """The size of a file and pieces of it, evenly spread: what a digest is made of that knows the same file in another
    place. No protection from somebody who wants two files to look alike. Raises OSError if it cannot be read."""
    size = os.path.getsize(path)
    yield size.to_bytes(8, "little")
    with open(path, "rb") as file:
        for i in range(_N_SAMPLES):
            file.seek(size * i // _N_SAMPLES)
            yield file.read(_SAMPLE_BYTES)
