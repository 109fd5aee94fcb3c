"""From an object file to an image: machine code that runs wherever it lies in memory.

An image is code and constants in one piece, with all references resolved. That can be, since they are relative: LLVM
makes kernels position-independent, and none refers to anything outside of itself. Whatever else there is in an object
file is refused: a wrong reference would be a crash.

Object files are ELF on all systems, and so that one image serves them all:

- On x86-64 kernels call each other by the convention of System V. Windows passes arguments in other registers and has
  its callees keep more of them, so that an image has a second entry for callers there, `entry_windows` (LLVM makes it).
- No code makes use of the 128 bytes below the stack's end, which Windows does not keep, and functions with large frames
  touch each page of them in turn, as stacks that grow by a guard page want it.
- On AArch64 the conventions are one. Register x18, which macOS and Windows have for themselves, is not used.

Sources: "Tool Interface Standard: ELF" (1995); "System V ABI, AMD64 Architecture Processor Supplement", 4.4; Arm, "ELF
for the Arm 64-bit Architecture" (AAELF64), 5.7.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from qrun.formats.dataclass import dataclass
from qrun.formats.errors import QrunError

MAGIC = b"qrunimg1"
HEADER = struct.Struct("<8sIIII")  # MAGIC, machine, entry, entry of Windows, size; then the code
X86_64, AARCH64 = 62, 183  # EM_X86_64, EM_AARCH64
NO_ENTRY = 0xFFFFFFFF

# What an image has to lie at multiples of. AArch64 forms addresses from a page and a place in it.
ALIGNMENT = {X86_64: 64, AARCH64: 4096}

_SYMBOL_TABLE, _RELOCATIONS, _NO_BITS, _RELOCATIONS_WITHOUT_ADDENDS = 2, 4, 8, 9  # section types
_WRITE, _ALLOCATED, _THREAD_LOCAL = 0x1, 0x2, 0x400  # section flags
_NOT_NEEDED = (".eh_frame",)  # for exceptions and debuggers

_PC32, _PLT32 = 2, 4  # R_X86_64_*
_PREL32, _PAGE, _PAGE_UNCHECKED, _ADD, _JUMP, _CALL = 261, 275, 276, 277, 282, 283  # R_AARCH64_*
_LOADS = {278: 1, 284: 2, 285: 4, 286: 8, 299: 16}  # R_AARCH64_LDST<bits>_ABS_LO12_NC: bytes that are loaded


class LinkError(QrunError, ValueError):
    """An object file, or an image, is not one that can be run."""


@dataclass(frozen=True)
class Image:
    """machine: ELF's number of the kind of CPU. entry, entry_windows: offsets in the code."""

    machine: int
    entry: int
    entry_windows: int | None
    code: bytes

    def to_bytes(self) -> bytes:
        windows = NO_ENTRY if self.entry_windows is None else self.entry_windows
        return HEADER.pack(MAGIC, self.machine, self.entry, windows, len(self.code)) + self.code

    @classmethod
    def from_bytes(cls, content: bytes) -> Image:
        """LinkError if it is none, or not a whole one."""
        if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
            raise LinkError("this is no image of machine code")
        _, machine, entry, windows, size = HEADER.unpack_from(content)
        if machine not in ALIGNMENT or size != len(content) - HEADER.size:
            raise LinkError("this image of machine code is not whole")
        if entry >= size or (windows != NO_ENTRY and windows >= size):
            raise LinkError("this image of machine code has an entry outside of it")
        return cls(machine, entry, None if windows == NO_ENTRY else windows, content[HEADER.size :])


@dataclass(frozen=True)
class _Section:
    name: str
    type: int
    flags: int
    data: bytes
    link: int
    info: int
    alignment: int


def link(content: bytes, entry: str, entry_windows: str | None = None) -> Image:
    """The image of a relocatable ELF file for x86-64 or AArch64. The entries are names of functions in it.

    Raises LinkError if it is damaged, or has anything that an image cannot have.
    """
    try:
        return _link(content, entry, entry_windows)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise LinkError(f"the object file is damaged ({error})") from error


def _link(content: bytes, entry: str, entry_windows: str | None) -> Image:
    machine, sections = _read(content)
    code, places = bytearray(), {}
    for index, section in enumerate(sections):
        if not section.flags & _ALLOCATED or section.name in _NOT_NEEDED:
            continue
        if not section.data and section.type != _NO_BITS:
            continue
        if section.flags & (_WRITE | _THREAD_LOCAL) or section.type == _NO_BITS:
            raise LinkError(f"the code has variables of its own ({section.name})")
        if section.alignment & (section.alignment - 1) or section.alignment > ALIGNMENT[machine]:
            raise LinkError(f"{section.name} is to be aligned to {section.alignment} bytes")
        code += bytes(-len(code) % max(section.alignment, 1))
        places[index] = len(code)
        code += section.data
    symbols, names = _symbols(sections, places)
    for section in sections:
        if section.info not in places or section.type not in (_RELOCATIONS, _RELOCATIONS_WITHOUT_ADDENDS):
            continue
        if section.type == _RELOCATIONS_WITHOUT_ADDENDS:
            raise LinkError(f"{section.name} has relocations without addends")
        size = len(sections[section.info].data)
        for offset, info, addend in struct.iter_unpack("<QQq", section.data):
            target = symbols[info >> 32]
            if target is None:
                raise LinkError("the code refers to something outside of it")
            if offset + 4 > size:
                raise LinkError("a relocation lies outside of its section")
            resolve = _resolve_x86_64 if machine == X86_64 else _resolve_aarch64
            resolve(code, places[section.info] + offset, info & 0xFFFFFFFF, target + addend)
    windows = None if entry_windows is None else _entry(names, entry_windows)
    return Image(machine, _entry(names, entry), windows, bytes(code))


def _entry(names: dict[str, int], name: str) -> int:
    if name not in names:
        raise LinkError(f"the code has no function {name}")
    return names[name]


def _read(content: bytes) -> tuple[int, list[_Section]]:
    if content[:6] != b"\x7fELF\x02\x01":
        raise LinkError("this is no object file in ELF's 64-bit form")
    kind, machine = struct.unpack_from("<HH", content, 16)
    if kind != 1 or machine not in ALIGNMENT:
        raise LinkError("this is no relocatable object file for x86-64 or AArch64")
    (start,) = struct.unpack_from("<Q", content, 40)
    size, count, names = struct.unpack_from("<HHH", content, 58)
    if size != 64 or start + size * count > len(content):
        raise LinkError("the object file is damaged (its table of sections)")
    fields = list(struct.iter_unpack("<IIQQQQIIQQ", content[start : start + size * count]))
    sections = []
    for name, type_, flags, _, offset, length, link_, info, alignment, _ in fields:
        if type_ not in (0, _NO_BITS) and offset + length > len(content):
            raise LinkError("the object file is damaged (a section is outside of it)")
        data = b"" if type_ in (0, _NO_BITS) else content[offset : offset + length]
        if type_ == _NO_BITS and not length:
            type_ = 0
        sections.append(_Section(_text(content, fields[names][4] + name), type_, flags, data, link_, info, alignment))
    return machine, sections


def _text(content: bytes, start: int) -> str:
    end = content.find(b"\0", start)
    if end < 0:
        raise LinkError("the object file is damaged (a name)")
    return content[start:end].decode()


def _symbols(sections: list[_Section], places: dict[int, int]) -> tuple[list[int | None], dict[str, int]]:
    """Where each symbol lies in the code, None for those that are not in it; and the same by name."""
    table = next((section for section in sections if section.type == _SYMBOL_TABLE), None)
    if table is None:
        raise LinkError("the object file has no symbols")
    symbols: list[int | None] = []
    named = {}
    for name, _, _, index, value, _ in struct.iter_unpack("<IBBHQQ", table.data):
        inside = index in places and value <= len(sections[index].data)
        symbols.append(places[index] + value if inside else None)
        if inside and name:
            named[_text(sections[table.link].data, name)] = places[index] + value
    return symbols, named


def _resolve_x86_64(code: bytearray, place: int, kind: int, target: int) -> None:
    """Put `target` into the four bytes at `place`."""
    if kind not in (_PC32, _PLT32):
        raise LinkError(f"relocations of kind {kind} are not known here (x86-64)")
    _put_signed(code, place, target - place)


def _put_signed(code: bytearray, place: int, value: int) -> None:
    if not -(1 << 31) <= value < 1 << 31:
        raise LinkError("the code is too large")
    struct.pack_into("<i", code, place, value)


def _resolve_aarch64(code: bytearray, place: int, kind: int, target: int) -> None:
    """Put `target` into the instruction at `place`."""
    if kind == _PREL32:
        _put_signed(code, place, target - place)
        return
    (word,) = struct.unpack_from("<I", code, place)
    if kind in (_PAGE, _PAGE_UNCHECKED):
        pages = (target >> 12) - (place >> 12)
        if not -(1 << 20) <= pages < 1 << 20:
            raise LinkError("the code is too large")
        word = word & ~(3 << 29 | 0x7FFFF << 5) | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind == _ADD or kind in _LOADS:
        within, size = target & 0xFFF, _LOADS.get(kind, 1)
        if within % size:
            raise LinkError(f"{size} bytes are loaded from an address that is no multiple of {size}")
        word = word & ~(0xFFF << 10) | within // size << 10
    elif kind in (_CALL, _JUMP):
        distance = target - place
        if distance % 4 or not -(1 << 27) <= distance < 1 << 27:
            raise LinkError("the code is too large")
        word = word & ~0x3FFFFFF | distance >> 2 & 0x3FFFFFF
    else:
        raise LinkError(f"relocations of kind {kind} are not known here (AArch64)")
    struct.pack_into("<I", code, place, word)


def placed(images: Iterable[Image]) -> tuple[bytes, list[int]]:
    """Images one after another, to be put at a page's beginning, and where each begins."""
    code, starts = bytearray(), []
    for image in images:
        code += bytes(-len(code) % ALIGNMENT[image.machine])
        starts.append(len(code))
        code += image.code
    return bytes(code), starts
