"""Find a font that draws a character: Pillow's own, then those installed on this machine, best known first.

What a font draws is read from the character map in its file, since names promise more than files hold. Font files are
looked at one by one, and only as far as some text needs it. Knows nothing of sizes and pictures.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import ImageFont

# Chinese, Japanese and Korean, with Chinese shapes where a file has several; emoji; wide Latin, Greek, Cyrillic, Hebrew.
KNOWN_FILES = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSans-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "NotoColorEmoji.ttf",
    "Apple Color Emoji.ttc",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",
)
FOLDERS = (
    "~/.local/share/fonts",
    "~/.fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
)
UNKNOWN_FILES = 400
"""So many files of other names are looked into at most, before a character counts as one that nothing draws."""

_STYLED = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono", "serif", "medium")
_DRAWS_ALL = ("lastresort", "adobeblank")  # a picture of a box for each character there is
_COLOURED = {b"CBDT", b"sbix", b"COLR"}


class Coverage:
    """A set of characters, kept as ranges of code points."""

    def __init__(self, ranges: Iterable[tuple[int, int]]):
        ordered = sorted(ranges)
        self._starts = [start for start, _ in ordered]
        self._ends = [end for _, end in ordered]

    def __contains__(self, character: str) -> bool:
        place = bisect_right(self._starts, ord(character)) - 1
        return place >= 0 and ord(character) <= self._ends[place]


@dataclass(frozen=True, slots=True, eq=False)
class Font:
    """One face of a font file; without a path, Pillow's own. `coloured`: it has pictures in colours."""

    path: Path | None
    face: int
    coverage: Coverage
    coloured: bool = False


class Fonts:
    """The fonts of some folders behind Pillow's own; a `folders` that is empty leaves that one alone."""

    def __init__(self, folders: Sequence[str] = FOLDERS):
        self._folders = folders
        self._read = [_bundled()]
        self._left = self._installed()
        self._known: dict[tuple[str, bool], Font | None] = {}

    @property
    def own(self) -> Font:
        """Pillow's own, which draws Latin."""
        return self._read[0]

    def drawing(self, character: str, *, coloured: bool = False) -> Font | None:
        """Return the first font that draws a character, a coloured one if asked and there is one; None where none does."""
        asked = (character, coloured)
        if asked not in self._known:
            found = next((font for font in self._all() if character in font.coverage), None)
            if coloured and found is not None and not found.coloured:
                better = (font for font in self._all() if font.coloured and character in font.coverage)
                found = next(better, found)
            self._known[asked] = found
        return self._known[asked]

    def _all(self) -> Iterator[Font]:
        place = 0
        while True:
            while place < len(self._read):
                yield self._read[place]
                place += 1
            font = next(self._left, None)
            if font is None:
                return
            self._read.append(font)

    def _installed(self) -> Iterator[Font]:
        for path in self._paths():
            try:
                yield _font_of(path)
            except (OSError, struct.error, ValueError):
                continue

    def _paths(self) -> Iterator[Path]:
        found: dict[str, Path] = {}
        for folder in self._folders:
            root = Path(folder).expanduser()
            if root.is_dir():
                for path in sorted(root.rglob("*.[to]t[cf]")):
                    found.setdefault(path.name, path)
        yield from (found.pop(name) for name in KNOWN_FILES if name in found)
        others = [name for name in found if not name.lower().startswith(_DRAWS_ALL)]
        others.sort(key=lambda name: (sum(style in name.lower() for style in _STYLED), name))
        yield from (found[name] for name in others[:UNKNOWN_FILES])


@cache
def installed() -> Fonts:
    """Return the fonts of this machine."""
    return Fonts()


def read_coverage(file: BinaryIO, face: int = 0) -> tuple[Coverage, bool]:
    """Read from a font file which characters a face draws, and whether in colours.

    Raises ValueError or struct.error where it is none. Source: OpenType's `cmap`, formats 4 and 12.
    """
    tables = _tables(file, face)
    if b"cmap" not in tables:
        raise ValueError("no character map")
    start, length = tables[b"cmap"]
    file.seek(start)
    data = file.read(length)
    _, count = struct.unpack_from(">HH", data)
    ranges: list[tuple[int, int]] = []
    for record in range(count):
        platform, _, offset = struct.unpack_from(">HHI", data, 4 + 8 * record)
        if platform not in (0, 3):
            continue
        (form,) = struct.unpack_from(">H", data, offset)
        if form == 12:
            return Coverage(_groups(data, offset)), not _COLOURED.isdisjoint(tables)
        if form == 4:
            ranges = list(_segments(data, offset))
    return Coverage(ranges), not _COLOURED.isdisjoint(tables)


def _tables(file: BinaryIO, face: int) -> dict[bytes, tuple[int, int]]:
    start = 0
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"ttcf":
        file.seek(12 + 4 * face)
        (start,) = struct.unpack(">I", file.read(4))
        file.seek(start)
        head = file.read(12)
    if head[:4] not in (b"\0\1\0\0", b"OTTO", b"true"):
        raise ValueError("not a font")
    (count,) = struct.unpack_from(">H", head, 4)
    records = (struct.unpack(">4sIII", file.read(16)) for _ in range(count))
    return {tag: (offset, length) for tag, _, offset, length in records}


def _groups(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    (count,) = struct.unpack_from(">I", data, at + 12)
    for start, end, glyph in struct.iter_unpack(">III", data[at + 16 : at + 16 + 12 * count]):
        yield (start, end) if glyph else (start + 1, end)


def _segments(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    (twice,) = struct.unpack_from(">H", data, at + 6)
    numbers = f">{twice // 2}H"
    ends, starts, deltas, offsets = (
        struct.unpack_from(numbers, data, at + 14 + skip) for skip in (0, twice + 2, 2 * twice + 2, 3 * twice + 2)
    )
    for place, (start, end, delta, offset) in enumerate(zip(starts, ends, deltas, offsets, strict=True)):
        if not offset:
            missing = (-delta) & 0xFFFF  # the character that maps to glyph 0
            inside = start <= missing <= end
            yield from [(start, missing - 1), (missing + 1, end)] if inside else [(start, end)]
            continue
        glyphs = at + 16 + 3 * twice + 2 * place + offset
        for character in range(start, end + 1):
            (glyph,) = struct.unpack_from(">H", data, glyphs + 2 * (character - start))
            if glyph:
                yield character, character


def _font_of(path: Path) -> Font:
    face = _chinese_face(path) if path.suffix.lower() == ".ttc" else 0
    with path.open("rb") as file:
        coverage, coloured = read_coverage(file, face)
    return Font(path, face, coverage, coloured)


def _chinese_face(path: Path) -> int:
    """The face with the shapes of simplified Chinese, in a file that has others for Japanese and Korean; else the first."""
    with path.open("rb") as file:
        _, _, count = struct.unpack(">4sII", file.read(12))
    for face in range(min(count, 32)):
        family = ImageFont.truetype(str(path), 16, index=face).getname()[0] or ""
        if family.endswith(" SC") and "Mono" not in family:
            return face
    return 0


def _bundled() -> Font:
    own = ImageFont.load_default(16)
    if not isinstance(own, ImageFont.FreeTypeFont):
        return Font(None, 0, Coverage([(0x20, 0x7E)]))
    return Font(None, 0, read_coverage(BytesIO(own.font_bytes))[0])
