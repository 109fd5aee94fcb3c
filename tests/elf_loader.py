"""Object files of AArch64 (ELF, relocatable) to bytes that can run at an address.

Of the format no more than LLVM makes of a kernel: sections of code and of constants, and relocations from one to the
other. Layout: "Tool Interface Standard: ELF", 1995; relocations: Arm, "ELF for the Arm 64-bit Architecture", AAELF64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SYMBOL_TABLE, RELOCATIONS, NO_BITS = 2, 4, 8  # section types
ALLOCATED = 2  # a section's flag: it is in memory when the program runs
PAGE_OF_SYMBOL, ADD_LOW_12 = 275, 277  # R_AARCH64_ADR_PREL_PG_HI21, R_AARCH64_ADD_ABS_LO12_NC
LOAD_LOW_12 = {278: 1, 284: 2, 285: 4, 286: 8, 299: 16}  # R_AARCH64_LDST<bits>_ABS_LO12_NC, and how many bytes it loads


@dataclass(frozen=True)
class Section:
    type: int
    flags: int
    data: bytes
    link: int
    info: int
    alignment: int


def link(code: bytes, address: int) -> tuple[bytes, dict[str, int]]:
    """An object file's memory as it has to be at `address` (aligned to a page), and the addresses of its symbols."""
    sections = _sections(code)
    image, places = bytearray(), {}
    for index, section in enumerate(sections):
        if section.flags & ALLOCATED and section.type != NO_BITS:
            image += bytes(-len(image) % max(section.alignment, 1))
            places[index] = address + len(image)
            image += section.data
    table = next(index for index, section in enumerate(sections) if section.type == SYMBOL_TABLE)
    names = sections[sections[table].link].data
    symbols, named = [], {}
    for name, _, _, index, value, _ in struct.iter_unpack("<IBBHQQ", sections[table].data):
        symbols.append(places[index] + value if index in places else None)
        if index in places:
            named[names[name : names.index(b"\0", name)].decode()] = places[index] + value
    for section in sections:
        if section.type == RELOCATIONS and section.info in places:
            for offset, info, addend in struct.iter_unpack("<QQq", section.data):
                target = symbols[info >> 32]
                if target is None:
                    raise ValueError(f"the code refers to symbol {info >> 32}, which is not in it")
                _relocate(image, address, places[section.info] + offset, info & 0xFFFFFFFF, target + addend)
    return bytes(image), named


def _sections(code: bytes) -> list[Section]:
    if code[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", code, 16) != (1, 183):
        raise ValueError("this is no relocatable ELF file for AArch64")
    (start,), (count,) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<H", code, 60)
    sections = []
    for _, type_, flags, _, offset, size, link_, info, alignment, _ in struct.iter_unpack(
        "<IIQQQQIIQQ", code[start : start + 64 * count]
    ):
        sections.append(Section(type_, flags, code[offset : offset + size], link_, info, alignment))
    return sections


def _relocate(image: bytearray, address: int, place: int, kind: int, target: int) -> None:
    """Put `target` into the instruction at `place`."""
    (word,) = struct.unpack_from("<I", image, place - address)
    if kind == PAGE_OF_SYMBOL:
        pages = (target >> 12) - (place >> 12)
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind == ADD_LOW_12:
        word |= (target & 0xFFF) << 10
    elif kind in LOAD_LOW_12:
        word |= (target & 0xFFF) // LOAD_LOW_12[kind] << 10
    else:
        raise ValueError(f"relocations of kind {kind} are not known here")
    struct.pack_into("<I", image, place - address, word)
