from pathlib import Path

import pytest
from PIL import Image, ImageFont

from farm.fonts import Fonts
from farm.lettering import Lettering
from tests.tiny_font import tiny_font

NONE = Fonts(())


@pytest.fixture
def chinese(tmp_path: Path) -> Fonts:
    (tmp_path / "Squares.ttf").write_bytes(tiny_font("国图 ，"))
    return Fonts([str(tmp_path)])


def drawn(fonts: Fonts, text: str, size_px: int = 40) -> Image.Image:
    image = Image.new("L", (400, 80), 255)
    Lettering(fonts, size_px).draw(image, (10, 10), text, "black")
    return image


def runs(fonts: Fonts, text: str) -> list[tuple[str, str]]:
    return [(font.path.stem if font.path else "own", part) for font, part in Lettering(fonts, 20)._runs(text)]


def test_each_stretch_of_text_is_in_the_first_font_that_draws_it(chinese: Fonts) -> None:
    assert runs(chinese, "a 国图，b国 c") == [
        ("own", "a "),
        ("Squares", "国图，"),
        ("own", "b"),
        ("Squares", "国"),
        ("own", " c"),
    ]
    assert runs(chinese, "plain") == [("own", "plain")]


def test_a_character_is_drawn_where_a_font_has_it_and_is_a_box_where_none_has(chinese: Fonts) -> None:
    square, box = drawn(chinese, "国"), drawn(NONE, "国")
    ink = [sum(1 for pixel in one.get_flattened_data() if pixel < 128) for one in (square, box)]
    assert ink[0] == pytest.approx(36 * 36, rel=0.1)  # 0.9 em each way, all of it black
    assert 0 < ink[1] < 36 * 36 / 2
    plain = [drawn(fonts, "abc") for fonts in (chinese, NONE)]
    assert len({one.crop(one.point(lambda level: 255 - level).getbbox()).tobytes() for one in plain}) == 1


def test_stretches_stand_side_by_side_on_one_line(chinese: Fonts) -> None:
    lettering = Lettering(chinese, 40)
    assert lettering.length("国图") == 80
    assert lettering.length("ab国") == pytest.approx(lettering.length("ab") + 40)
    own = ImageFont.load_default(40)
    assert isinstance(own, ImageFont.FreeTypeFont)
    assert Lettering(NONE, 40).length("ab c") == own.getlength("ab c")
    black = drawn(chinese, "国 国").point(lambda level: 255 * (level < 128)).getbbox()
    assert black is not None
    assert black[2] - black[0] == pytest.approx(2 * 40 - 4 + own.getlength(" "), abs=2)


def test_text_breaks_at_spaces_and_between_ideographs(chinese: Fonts) -> None:
    lettering = Lettering(chinese, 20)
    assert lettering.wrap("国图国图国图", 45, 9) == ["国图", "国图", "国图"]
    assert lettering.wrap("国图国图国图", 45, 2)[1] in ("国…", "国图…")
    assert lettering.wrap("ab 国国国", 65, 9)[0].startswith("ab 国")
    assert lettering.wrap("", 45, 2) == [""]
    assert all(lettering.length(line) <= 50 for line in lettering.wrap("x" * 50 + " 国图" * 9, 50, 99))


def test_what_belongs_together_is_not_torn_apart() -> None:
    lettering = Lettering(NONE, 20)
    family, flag, wave = "👩\u200d🚀", "🇩🇪", "👍🏽"
    lines = lettering.wrap(family + flag + wave + "e\u0301" * 3, 1, 99)
    assert lines == [family, flag, wave, *["e\u0301"] * 3]


def test_controls_and_marks_of_direction_leave_no_trace() -> None:
    assert Lettering(NONE, 20).wrap("a\0b\u202ec\u200bd\ud83ce", 500, 1) == ["abcde"]


def test_a_hebrew_sentence_keeps_its_blanks_and_digits_in_one_stretch(tmp_path: Path) -> None:
    (tmp_path / "Hebrew.ttf").write_bytes(tiny_font("עיגול ,3"))
    fonts = Fonts([str(tmp_path)])
    assert runs(fonts, "a עיגול, 3 עיגול b") == [("own", "a "), ("Hebrew", "עיגול, 3 עיגול "), ("own", "b")]


def test_an_emoji_is_one_box_where_nothing_draws_it() -> None:
    assert runs(NONE, "👩\u200d🚀!") == [("own", "👩!")]
