"""Draw pictures in rows and columns with a heading over each column and words before each row: what varies is seen at once.

Knows nothing of jobs and files: pictures come as pixels. Every cell has the same box; a missing picture is a grey one.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from farm.fonts import Fonts, installed
from farm.lettering import Lettering
from farm.sheet import BACKGROUND, DETAIL_SIZE, EDGE, FAILED, FAINT, GAP, INK, MARGIN, PROMPT_SIZE, TITLE_SIZE

SIDE = 224
"""Longest side of a picture in the grid, small ones enlarged and large ones made smaller."""
WORDS_WIDTH = 190
WORDS_LINES = 9


@dataclass(frozen=True, slots=True)
class GridRow:
    """One row: what stands before it, the first line in ink, and a picture a column, each with words below it."""

    title: str
    text: str
    pictures: tuple[np.ndarray | None, ...]
    captions: tuple[str, ...] = ()


def draw_grid(
    title: str, subtitle: str, *, columns: Sequence[str], rows: Sequence[GridRow], fonts: Fonts | None = None
) -> bytes:
    """Draw the grid and return it as PNG. Wants one row at least, each with a picture, or None, for every column."""
    fonts = fonts or installed()
    titles, heads, details = (Lettering(fonts, size) for size in (TITLE_SIZE, PROMPT_SIZE, DETAIL_SIZE))
    box = _box([picture for row in rows for picture in row.pictures if picture is not None])
    below = details.line_height + 4 if any(row.captions for row in rows) else 0
    step = max(box[1] + below, heads.line_height * 2) + GAP
    left = MARGIN + WORDS_WIDTH + GAP
    width = left + len(columns) * (box[0] + GAP) - GAP + MARGIN
    top = MARGIN + titles.line_height + heads.line_height * 2 + 30
    sheet = Image.new("RGB", (width, top + step * len(rows) - GAP + MARGIN), BACKGROUND)
    titles.draw(sheet, (MARGIN, MARGIN), titles.wrap(title, width - 2 * MARGIN, 1)[0], INK)
    under = MARGIN + titles.line_height + 2
    heads.draw(sheet, (MARGIN, under), heads.wrap(subtitle, width - 2 * MARGIN, 1)[0], FAINT)
    for place, name in enumerate(columns):
        at = left + place * (box[0] + GAP), top - heads.line_height - 6
        heads.draw(sheet, at, heads.wrap(name, box[0], 1)[0], INK)
    for number, row in enumerate(rows):
        line = top + number * step
        heads.draw(sheet, (MARGIN, line), heads.wrap(row.title, WORDS_WIDTH, 1)[0], INK)
        line += heads.line_height + 2
        room = min(WORDS_LINES, max(0, (box[1] - heads.line_height) // details.line_height))
        for text in details.wrap(row.text, WORDS_WIDTH, room) if room and row.text else ():
            details.draw(sheet, (MARGIN, line), text, FAINT)
            line += details.line_height
        for place, picture in enumerate(row.pictures):
            at = left + place * (box[0] + GAP), top + number * step
            _paste(sheet, picture, at, box)
            if row.captions:
                said = details.wrap(row.captions[place], box[0], 1)[0]
                details.draw(sheet, (at[0], at[1] + box[1] + 4), said, FAINT)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


def _box(pictures: Sequence[np.ndarray]) -> tuple[int, int]:
    """Room for every picture, in proportion, its longest side SIDE."""
    sizes = [_fitted(picture.shape[1], picture.shape[0], (SIDE, SIDE)) for picture in pictures]
    return max((w for w, _ in sizes), default=SIDE), max((h for _, h in sizes), default=SIDE)


def _fitted(width: int, height: int, box: tuple[int, int]) -> tuple[int, int]:
    ratio = min(box[0] / width, box[1] / height)
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def _paste(sheet: Image.Image, pixels: np.ndarray | None, at: tuple[int, int], box: tuple[int, int]) -> None:
    if pixels is None:
        ImageDraw.Draw(sheet).rectangle((*at, at[0] + box[0] - 1, at[1] + box[1] - 1), fill=FAILED)
        return
    size = _fitted(pixels.shape[1], pixels.shape[0], box)
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    left, top = at[0] + (box[0] - size[0]) // 2, at[1] + (box[1] - size[1]) // 2
    sheet.paste(resized, (left, top))
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=EDGE)
