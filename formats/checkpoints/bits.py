"""Codes of a few bits packed into 32-bit words.

Codes follow each other from the lowest bit up and run on across the borders of words, as the bits of one long number:

    3 bits   word 0: codes 0..9, then the low two bits of code 10; word 1: its third bit, codes 11..20, ...

After as many codes as a word has bits, a code begins with a word again; if the number of bits divides 32, with every
word.
"""

from math import gcd

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32


def unpack(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Take words apart along the first axis: [n * bits / 32, ...] -> codes [n, ...]. n: a multiple of the period."""
    period = codes_in_period(bits)
    words_in_period = period * bits // WORD_BITS
    packed = words.reshape(len(words) // words_in_period, words_in_period, *words.shape[1:])
    codes = np.empty((len(packed), period, *words.shape[1:]), np.uint8)
    for i in range(period):
        at, shift = divmod(i * bits, WORD_BITS)
        code = packed[:, at] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            code |= packed[:, at + 1] << np.uint32(WORD_BITS - shift)
        codes[:, i] = code & np.uint32((1 << bits) - 1)
    return codes.reshape(len(packed) * period, *words.shape[1:])


def codes_in_period(bits: int) -> int:
    """After how many codes the pattern repeats."""
    return WORD_BITS // gcd(bits, WORD_BITS)


def unpack_range(words: NDArray[np.uint32], bits: int, start: int, end: int) -> NDArray[np.uint8]:
    """Codes start to end along the first axis, touching only the words around them."""
    period = codes_in_period(bits)
    first, last = start // period, -(-end // period)
    words_in_period = period * bits // WORD_BITS
    codes = unpack(words[first * words_in_period : last * words_in_period], bits)
    return codes[start - first * period : end - first * period]
