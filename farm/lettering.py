"""Set text of any script at one size: each stretch in the first font that draws it, lines broken at a width.

What no font draws becomes the box of Pillow's own. Emoji are pictures of one size in their font, and are made to fit.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from farm.fonts import Font, Fonts

LINE_CHARACTERS = 1000
"""More than fit on any line: what of a text lies beyond is not measured, since Pillow refuses a text of megabytes."""

_STRIKES = (109, 160, 136, 128, 96, 64, 32)  # pixel sizes of the pictures in fonts that have no outlines
_JOINER, _EMOJI, _KEYCAP = "\u200d", "\ufe0f", "\u20e3"
_SAMPLE = "Ágjy国"


@dataclass(frozen=True, slots=True)
class _Face:
    """A font at the size, or at a fixed one that is multiplied by `scale`."""

    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    scale: float = 1.0


class Lettering:
    """Text at `size_px`."""

    def __init__(self, fonts: Fonts, size_px: int):
        self._fonts = fonts
        self._size_px = size_px
        self._faces: dict[Font, _Face] = {}
        tops, bottoms = zip(*(self._extent(letter) for letter in _SAMPLE), strict=True)
        self._ascent = round(-min(tops))
        self.line_height = self._ascent + round(max(bottoms)) + 3

    def length(self, text: str) -> float:
        """Return the width of a line in pixels."""
        return sum(self._face(font).font.getlength(part) * self._face(font).scale for font, part in self._runs(text))

    def draw(self, image: Image.Image, at: tuple[int, int], text: str, fill: str) -> None:
        """Draw a line whose top left corner is `at`."""
        draw = ImageDraw.Draw(image)
        left, baseline = float(at[0]), at[1] + self._ascent
        for font, part in self._runs(text):
            face = self._face(font)
            if face.scale == 1.0:
                draw.text((left, baseline), part, font=face.font, fill=fill, anchor="ls", embedded_color=font.coloured)
            else:
                self._draw_pictures(image, face, (left, baseline), part)
            left += face.font.getlength(part) * face.scale

    def wrap(self, text: str, width: int, lines: int) -> list[str]:
        """Break text into at most `lines` lines of `width` pixels, at spaces, else (CJK, long words) between letters."""
        text = _printable(text[: LINE_CHARACTERS * (lines + 1)])
        broken: list[str] = []
        line = ""
        for word in _words(text):
            if self.length(line + word.rstrip()) <= width:
                line += word
                continue
            if line.strip():
                broken.append(line.rstrip())
            line = ""
            for letter in _clusters(word):
                if line and self.length(line + letter.rstrip()) > width:
                    broken.append(line)
                    line = ""
                line += letter
            if len(broken) > lines:
                break
        if line.strip():
            broken.append(line.rstrip())
        if len(broken) <= lines:
            return broken or [""]
        last = list(_clusters(broken[lines - 1]))
        while last and self.length("".join(last) + "…") > width:
            last.pop()
        return [*broken[: lines - 1], "".join(last).rstrip() + "…"]

    def flow(self, parts: Sequence[str], width: int, lines: int) -> list[str]:
        """Set short parts side by side with dots between them, as many on a line as fit."""
        flowed: list[str] = []
        for part in parts:
            joined = f"{flowed[-1]} · {part}" if flowed else part
            if flowed and self.length(joined) <= width:
                flowed[-1] = joined
            else:
                flowed += self.wrap(part, width, lines)
        return flowed[:lines]

    def _runs(self, text: str) -> Iterator[tuple[Font, str]]:
        """Cut text where the font changes.

        Blanks, signs and digits behind a letter that is written from right to left stay in its font, since the order of
        such a sentence is found only as far as one font goes.
        """
        font, run, leftward = self._fonts.own, "", False
        for cluster in _clusters(text):
            first = cluster[0]
            if not (leftward and unicodedata.category(first)[0] in "ZPSN" and first in font.coverage):
                found = self._fonts.drawing(first, coloured=_EMOJI in cluster or ord(first) >= 0x1F000)
                if found is None:
                    found, cluster = self._fonts.own, first  # one box, not one for each of its marks
                if found is not font and run:
                    yield font, run
                    run = ""
                font, leftward = found, unicodedata.bidirectional(first) in ("R", "AL")
            run += cluster
        if run:
            yield font, run

    def _face(self, font: Font) -> _Face:
        if font not in self._faces:
            self._faces[font] = self._opened(font)
        return self._faces[font]

    def _opened(self, font: Font) -> _Face:
        if font.path is None:
            return _Face(ImageFont.load_default(self._size_px))
        for size_px in (self._size_px, *_STRIKES):
            try:
                opened = ImageFont.truetype(str(font.path), size_px, index=font.face)
            except OSError:  # no outlines, and no pictures of this size
                continue
            return _Face(opened, self._size_px / size_px)
        return _Face(ImageFont.load_default(self._size_px))

    def _extent(self, letter: str) -> tuple[float, float]:
        """How far a letter reaches above (negative) and below the line."""
        face = self._face(self._fonts.drawing(letter) or self._fonts.own)
        _, top, _, bottom = face.font.getbbox(letter, anchor="ls")
        return top * face.scale, bottom * face.scale

    def _draw_pictures(self, image: Image.Image, face: _Face, at: tuple[float, float], text: str) -> None:
        left, top, right, bottom = (round(edge) for edge in face.font.getbbox(text, anchor="ls"))
        if right <= left or bottom <= top:
            return
        drawn = Image.new("RGBA", (right - left, bottom - top))
        ImageDraw.Draw(drawn).text((-left, -top), text, font=face.font, anchor="ls", embedded_color=True)
        size = max(1, round(drawn.width * face.scale)), max(1, round(drawn.height * face.scale))
        drawn = drawn.resize(size, Image.Resampling.LANCZOS)
        image.paste(drawn, (round(at[0] + left * face.scale), round(at[1] + top * face.scale)), drawn)


def _printable(text: str) -> str:
    """The text without what has no shape of its own: controls, marks of direction, halves of surrogate pairs."""
    kept = (_JOINER, "\u200c")
    return "".join(
        letter for letter in text if letter in kept or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
    )


def _clusters(text: str) -> Iterator[str]:
    """Cut text into letters with the marks that belong to them, and whole emoji."""
    cluster = ""
    for letter in text:
        if cluster and (_extends(letter) or cluster[-1] == _JOINER or _is_flag(cluster, letter)):
            cluster += letter
        else:
            if cluster:
                yield cluster
            cluster = letter
    if cluster:
        yield cluster


def _extends(letter: str) -> bool:
    is_mark = unicodedata.category(letter)[0] == "M"
    return is_mark or letter in (_JOINER, _KEYCAP) or 0x1F3FB <= ord(letter) <= 0x1F3FF


def _is_flag(cluster: str, letter: str) -> bool:
    return len(cluster) == 1 and all(0x1F1E6 <= ord(one) <= 0x1F1FF for one in (cluster, letter))


def _words(text: str) -> Iterator[str]:
    """Cut text after spaces, and around every ideograph, syllable or full-width sign: a line may end there."""
    word = ""
    for cluster in _clusters(text):
        if cluster == " ":
            yield word + " "
            word = ""
        elif ord(cluster[0]) >= 0x2E80:
            if word:
                yield word
            yield cluster
            word = ""
        else:
            word += cluster
    if word:
        yield word
