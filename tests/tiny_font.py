"""A font file of a few hundred bytes that draws some characters, each as a solid square: for tests of who draws what."""

import struct
from collections.abc import Sequence

EM = 1000


def tiny_font(characters: str, *, form: int = 12, tables: Sequence[bytes] = ()) -> bytes:
    """Return a TrueType font whose map has the format 4 or 12. `tables`: names of empty tables that it has besides."""
    codes = sorted(map(ord, characters))
    square = struct.pack(">hhhhh", 1, 0, 0, 900, 900) + struct.pack(">HH", 3, 0) + bytes([1, 1, 1, 1])
    square += struct.pack(">4h", 0, 0, 900, 0) + struct.pack(">4h", 0, 900, 0, -900)
    head = struct.pack(">IIIIHHQQhhhhHHhhh", 0x10000, 0, 0, 0x5F0F3CF5, 0, EM, 0, 0, 0, 0, 900, 900, 0, 8, 2, 1, 0)
    hhea = struct.pack(">IhhhHhhhhhh8xhH", 0x10000, 900, 0, 0, EM, 0, 0, 900, 1, 0, 0, 0, 2)
    maxp = struct.pack(">IH", 0x10000, 2) + struct.pack(">13H", 4, 1, 0, 0, 1, *[0] * 8)
    parts = {
        b"cmap": struct.pack(">HHHHI", 0, 1, 3, 10 if form == 12 else 1, 12)
        + (_groups if form == 12 else _segments)(codes),
        b"glyf": square,
        b"head": head,
        b"hhea": hhea,
        b"hmtx": struct.pack(">HhHh", EM, 0, EM, 0),
        b"loca": struct.pack(">III", 0, 0, len(square)),
        b"maxp": maxp,
        **dict.fromkeys(tables, b"\x00" * 4),
    }
    return _file(parts)


def collection(fonts: Sequence[bytes]) -> bytes:
    """Return a file of several faces."""
    head = 12 + 4 * len(fonts)
    starts = [head + sum(len(font) for font in fonts[:place]) for place in range(len(fonts))]
    moved = [_moved(font, start) for font, start in zip(fonts, starts, strict=True)]
    return (
        struct.pack(">4sII", b"ttcf", 0x10000, len(fonts)) + struct.pack(f">{len(starts)}I", *starts) + b"".join(moved)
    )


def _groups(codes: Sequence[int]) -> bytes:
    groups = b"".join(struct.pack(">III", code, code, 1) for code in codes)
    return struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(codes)) + groups


def _segments(codes: Sequence[int]) -> bytes:
    """The first half of the characters by their distance to the glyph, the rest through the array of glyphs."""
    count = len(codes) + 1
    every = [*codes, 0xFFFF]
    by_array = [place >= len(codes) // 2 for place in range(len(codes))]
    deltas = [0 if by else (1 - code) & 0xFFFF for code, by in zip(codes, by_array, strict=True)] + [1]
    offsets = [2 * (count - place) if by else 0 for place, by in enumerate(by_array)] + [0]
    numbers = [*every, 0, *every, *deltas, *offsets, 1]
    data = struct.pack(f">{len(numbers)}H", *numbers)
    return struct.pack(">HHHHHHH", 4, 14 + len(data), 0, 2 * count, 0, 0, 0) + data


def _file(parts: dict[bytes, bytes]) -> bytes:
    at = 12 + 16 * len(parts)
    records = body = b""
    for name, data in sorted(parts.items()):
        records += struct.pack(">4sIII", name, 0, at + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    return struct.pack(">IHHHH", 0x10000, len(parts), 0, 0, 0) + records + body


def _moved(font: bytes, by: int) -> bytes:
    (count,) = struct.unpack_from(">H", font, 4)
    moved = bytearray(font)
    for record in range(count):
        (offset,) = struct.unpack_from(">I", font, 12 + 16 * record + 8)
        struct.pack_into(">I", moved, 12 + 16 * record + 8, offset + by)
    return bytes(moved)
