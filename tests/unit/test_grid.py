import io

import numpy as np
from PIL import Image

from farm.fonts import Fonts
from farm.grid import GAP, SIDE, GridRow, draw_grid
from farm.sheet import FAILED, MARGIN

FONTS = Fonts(folders=())


def filled(width: int, height: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def drawn(rows: list[GridRow], columns: list[str]) -> Image.Image:
    return Image.open(io.BytesIO(draw_grid("a title", "below it", columns=columns, rows=rows, fonts=FONTS)))


def test_pictures_stand_in_their_columns_and_rows() -> None:
    red, blue = filled(64, 64, (200, 0, 0)), filled(64, 64, (0, 0, 200))
    rows = [GridRow("seed 0", "a prompt", (red, blue)), GridRow("seed 1", "a prompt", (blue, red))]
    sheet = drawn(rows, ["4 steps", "8 steps"])
    left = sheet.width - MARGIN - SIDE // 2 - SIDE - GAP
    right = sheet.width - MARGIN - SIDE // 2
    bottom = sheet.height - MARGIN - SIDE // 2
    top = bottom - SIDE - GAP
    seen = [sheet.getpixel(at) for at in ((left, top), (right, top), (left, bottom), (right, bottom))]
    assert seen == [(200, 0, 0), (0, 0, 200), (0, 0, 200), (200, 0, 0)]


def test_a_wide_picture_keeps_its_proportions_and_a_missing_one_is_grey() -> None:
    wide = filled(128, 64, (0, 120, 0))
    sheet = drawn([GridRow("", "", (wide, None), ("1 s", ""))], ["a", "b"])
    green = np.argwhere((np.asarray(sheet) == (0, 120, 0)).all(axis=2))
    height, width = green.max(axis=0) - green.min(axis=0) + 1
    assert (width, height) == (SIDE, SIDE // 2)
    grey = tuple(int(FAILED[place : place + 2], 16) for place in (1, 3, 5))
    assert (np.asarray(sheet) == grey).all(axis=2).sum() >= SIDE * SIDE // 2


def test_long_words_are_cut_to_their_room() -> None:
    picture = filled(64, 64, (1, 2, 3))
    short = drawn([GridRow("a", "b", (picture,))], ["c"])
    long = drawn([GridRow("a" * 500, "word " * 500, (picture,))], ["c" * 500])
    assert long.size == short.size
