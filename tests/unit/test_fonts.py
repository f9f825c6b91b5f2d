import io
from pathlib import Path

import pytest

from farm.fonts import Fonts, installed, read_coverage
from tests.tiny_font import collection, tiny_font


@pytest.mark.parametrize("form", [4, 12])
def test_a_font_says_in_its_file_what_it_draws(form: int) -> None:
    coverage, coloured = read_coverage(io.BytesIO(tiny_font("ab国語한é", form=form)))
    assert [letter for letter in "abc国图語한é" if letter in coverage] == list("ab国語한é")
    assert coloured is False


def test_each_face_of_a_file_has_a_map_of_its_own() -> None:
    faces = collection([tiny_font("a"), tiny_font("国")])
    assert "国" not in read_coverage(io.BytesIO(faces), 0)[0]
    assert "国" in read_coverage(io.BytesIO(faces), 1)[0]


def test_pillows_own_comes_first_and_the_others_only_where_it_lacks_something(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "Zebra-Regular.ttf").write_bytes(tiny_font("ab国"))
    (tmp_path / "deep" / "Ape-Bold.ttf").write_bytes(tiny_font("国한"))
    (tmp_path / "wqy-zenhei.ttc").write_bytes(collection([tiny_font("图")]))
    fonts = Fonts([str(tmp_path), "/nowhere"])
    assert fonts.drawing("a") is fonts.own
    found = {letter: font.path and font.path.name for letter in "国한图" if (font := fonts.drawing(letter))}
    assert found == {"国": "Zebra-Regular.ttf", "한": "Ape-Bold.ttf", "图": "wqy-zenhei.ttc"}
    assert fonts.drawing("\U000f0000") is None


def test_files_that_are_no_fonts_are_passed_over(tmp_path: Path) -> None:
    whole = tiny_font("国")
    for name, data in {"a.ttf": b"", "b.ttf": b"text", "c.otf": whole[:60], "d.ttc": b"ttcf", "e.ttf": whole}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "f.ttf").symlink_to("gone.ttf")
    (tmp_path / "LastResort.otf").write_bytes(tiny_font("图"))
    fonts = Fonts([str(tmp_path)])
    font = fonts.drawing("国")
    assert font is not None
    assert font.path == tmp_path / "e.ttf"
    assert fonts.drawing("图") is None


def test_a_coloured_font_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "DejaVuSans.ttf").write_bytes(tiny_font("☀★"))
    (tmp_path / "Zebra.ttf").write_bytes(tiny_font("☀", tables=[b"COLR"]))
    fonts = Fonts([str(tmp_path)])
    names = [(letter, coloured) for letter in "☀★" for coloured in (False, True)]
    found = [font.path and font.path.stem for name in names if (font := fonts.drawing(name[0], coloured=name[1]))]
    assert found == ["DejaVuSans", "Zebra", "DejaVuSans", "DejaVuSans"]


def test_what_is_installed_here_is_read_without_trouble() -> None:
    assert installed() is installed()
    assert installed().drawing("a") is installed().own
    assert installed().drawing("\U000f0000") is None
