"""`farm prompt`: what is typed becomes prompts and settings, and pictures become numbered files."""

from pathlib import Path

import pytest

from farm.cli.prompt import Reading, Settings, _save
from farm.client import Image
from farm.errors import InputError, PictureError


def read(*lines: str) -> list[str]:
    reading = Reading()
    found = [reading.take(line) for line in lines]
    return [one for one in [*found, reading.rest()] if one is not None]


def test_a_line_is_a_prompt() -> None:
    assert read("a red circle", "", "  a blue star ") == ["a red circle", "a blue star"]


def test_a_tag_is_read_on_until_it_is_closed() -> None:
    lines = ["<scene>", "  <object>a red circle</object>", "", "</scene>", "a blue star"]
    assert read(*lines[:2], *lines[3:]) == ["<scene>\n  <object>a red circle</object>\n</scene>", "a blue star"]
    assert read("<scene><object>a</object></scene>") == ["<scene><object>a</object></scene>"]
    assert read("<scene/>", "x") == ["<scene/>", "x"]


def test_a_tag_within_itself_is_closed_twice() -> None:
    assert read("<box>", "<box a='1'>", "</box>", "</box>", "x") == ["<box>\n<box a='1'>\n</box>\n</box>", "x"]


def test_a_scene_is_read_on_through_its_characters_to_the_end_of_its_general_tags() -> None:
    scene = [
        "<character_1>",
        "<n>a</n>",
        "</character_1>",
        "",
        "<character_2><n>b</n></character_2>",
        "",
        "<general_tags>",
    ]
    scene += ["<style>x</style>", "</general_tags>"]
    assert read(*scene, "a blue star") == ["\n".join(scene), "a blue star"]
    assert read("<character_1><n>a</n></character_1>", "", "", "x") == ["<character_1><n>a</n></character_1>", "x"]


def test_a_blank_line_or_the_end_closes_what_is_open() -> None:
    assert read("<scene>", "red", "", "x") == ["<scene>\nred", "x"]
    assert read("<scene>", "red") == ["<scene>\nred"]


def test_less_than_is_no_tag() -> None:
    assert read("1 < 2", "< 3 circles") == ["1 < 2", "< 3 circles"]


def test_settings_are_changed_put_back_and_shown() -> None:
    settings = Settings("sketch")
    assert settings.change("steps", "8") == "steps: 8"
    assert settings.change("size", "64 x 64") == "size: 64x64"
    assert settings.values == {"num_inference_steps": 8, "size": "64x64"}
    assert settings.change("steps", "") == "steps: the model's own"
    assert settings.values == {"size": "64x64"}
    assert settings.lines()[0] == "  model     sketch"
    assert "  size      64x64" in settings.lines()


def test_a_licence_is_warned_of_once_and_a_prompt_each_time() -> None:
    settings = Settings("newbie")
    licence, brand = {"code": "licence", "text": "not for sale"}, {"code": "brand", "text": "names a brand"}
    assert settings.news([licence, brand]) == [licence, brand]
    assert settings.news([licence, brand]) == [brand]
    assert settings.news(None) == []


@pytest.mark.parametrize(
    ("word", "text", "message"),
    [
        ("steps", "many", "/steps many: write a whole number"),
        ("guidance", "x", "/guidance x: write a number"),
        ("size", "big", "/size big: write width and height, as 1024x768"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(word: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Settings().change(word, text)
    assert caught.value.message == message


def test_an_unknown_setting_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"^/cfg is no setting; there are /steps, /guidance, /size"):
        Settings().change("cfg", "7")


def test_pictures_are_numbered_and_replace_nothing(tmp_path: Path) -> None:
    (tmp_path / "0007.jpg").write_bytes(b"somebody's")
    assert _save(Image(b"\x89PNG", 1, 0.1), tmp_path) == tmp_path / "0008.png"
    assert _save(Image(b"RIFF....WEBP", 1, 0.1), tmp_path) == tmp_path / "0009.webp"
    assert (tmp_path / "0008.png").read_bytes() == b"\x89PNG"
    with pytest.raises(PictureError, match="cannot be written: Not a directory; name another folder with --to"):
        _save(Image(b"\x89PNG", 1, 0.1), tmp_path / "0008.png" / "below")
