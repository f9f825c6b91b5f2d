"""Structured prompts: built, and read back."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.errors import PromptError
from farm.scene import (
    CHARACTER_ELEMENTS,
    GENERAL_ELEMENTS,
    Character,
    GeneralTags,
    Scene,
    marks,
    plain_text,
    read_scene,
    tag_line,
)

PAIR = Scene(
    (
        Character(
            n="$character_1$", gender="1girl", appearance="blue_hair, teal_eyes", pose="standing", position="left"
        ),
        Character(n="$character_2$", gender="1boy", clothing="coat", action="holding_umbrella"),
    ),
    GeneralTags(caption="rain", count="1girl, 1boy", style="anime_style"),
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def test_a_scene_is_written_in_one_order_whatever_it_was_said_in() -> None:
    assert PAIR.xml() == (
        "<character_1>\n"
        "<n>$character_1$</n>\n"
        "<gender>1girl</gender>\n"
        "<appearance>blue_hair, teal_eyes</appearance>\n"
        "<pose>standing</pose>\n"
        "<position>left</position>\n"
        "</character_1>\n"
        "\n"
        "<character_2>\n"
        "<n>$character_2$</n>\n"
        "<gender>1boy</gender>\n"
        "<clothing>coat</clothing>\n"
        "<action>holding_umbrella</action>\n"
        "</character_2>\n"
        "\n"
        "<general_tags>\n"
        "<count>1girl, 1boy</count>\n"
        "<style>anime_style</style>\n"
        "<caption>rain</caption>\n"
        "</general_tags>"
    )
    assert read_scene(PAIR.xml()) == PAIR


def test_the_elements_are_the_models_own() -> None:
    assert [name for name in CHARACTER_ELEMENTS if name not in ("body_type", "pose", "interaction")] == [
        *("n", "gender", "appearance", "clothing", "expression", "action", "position")
    ]
    assert GENERAL_ELEMENTS[:7] == ("count", "style", "background", "atmosphere", "quality", "objects", "other")
    assert set(GENERAL_ELEMENTS[7:]) == {
        *("artist", "artists", "lighting", "resolution", "environment", "perspective", "interaction", "caption")
    }


def test_brackets_ampersands_and_parentheses_are_escaped_and_other_scripts_are_not() -> None:
    scene = Scene((Character(n="miku_(vocaloid)", appearance="蓝发、<长>双马尾（青）", clothing="a&b"),))
    assert scene.xml() == (
        "<character_1>\n"
        r"<n>miku_\(vocaloid\)</n>" + "\n"
        "<appearance>蓝发、&lt;长&gt;双马尾（青）</appearance>\n"
        "<clothing>a&amp;b</clothing>\n"
        "</character_1>"
    )
    assert read_scene(scene.xml()) == scene


def test_parentheses_that_were_escaped_already_stay_escaped_once() -> None:
    assert Character(n=r"miku_\(vocaloid\)") == Character(n="miku_(vocaloid)")
    assert r"<n>miku_\(vocaloid\)</n>" in Scene((Character(n=r"miku_\\(vocaloid\\)"),)).xml()


def test_a_list_of_tags_is_a_line() -> None:
    assert tag_line(["blue_hair", "teal_eyes"]) == "blue_hair, teal_eyes"
    assert tag_line("as, it is") == "as, it is"


def test_a_scene_of_general_tags_alone_has_no_character() -> None:
    scene = Scene((), GeneralTags(background="a street"))
    assert scene.xml() == "<general_tags>\n<background>a street</background>\n</general_tags>"
    assert read_scene(scene.xml()) == scene
    assert Scene().xml() == ""
    assert read_scene("") == Scene()


def test_characters_are_read_by_their_numbers_and_on_one_line() -> None:
    text = "<character_10><n>b</n></character_10><character_2><n>a</n><pose/></character_2>"
    assert read_scene(text) == Scene((Character(n="a"), Character(n="b")))


@given(
    st.lists(st.builds(Character, **dict.fromkeys(CHARACTER_ELEMENTS, TEXT)), max_size=3),
    st.builds(GeneralTags, **dict.fromkeys(GENERAL_ELEMENTS, TEXT)),
)
def test_whatever_a_scene_says_reading_it_back_gives_the_same(
    characters: list[Character], general: GeneralTags
) -> None:
    scene = Scene(tuple(characters), general)
    assert read_scene(scene.xml()) == scene


@given(st.text("<>/ab_ character_1general_tags\n&;\\()", max_size=60))
def test_any_text_is_a_scene_or_is_refused_with_its_line(text: str) -> None:
    try:
        scene = read_scene(text)
    except PromptError as error:
        refusal = error.message
    else:
        refusal = None
        assert read_scene(scene.xml()) == scene
    assert refusal is None or refusal.startswith("line ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a girl", "line 1 of the scene: 'a girl' stands outside of the elements; put it into one"),
        ("<girl></girl>", "line 1 of the scene: <girl> is neither <character_N> nor <general_tags>; take it out"),
        (
            "<character_1>\n<hair>x</hair></character_1>",
            "line 2 of the scene: <hair> is no element in <character_1>; take it out",
        ),
        (
            "<general_tags><style>a</style><style>b</style></general_tags>",
            "line 1 of the scene: <style> stands twice in <general_tags>; take it out",
        ),
        (
            "<character_1>\n<n>a\n</character_1>",
            "line 2 of the scene: <n> is not closed; write </n> after it",
        ),
        ("<character_1>", "line 1 of the scene: <character_1> is not closed; write </character_1> after it"),
        (
            "<character_1></general_tags>",
            "line 1 of the scene: </general_tags> stands where </character_1> should; mend it",
        ),
        (
            "<general_tags></general_tags>\n<general_tags></general_tags>",
            "line 2 of the scene: <general_tags> does not begin here; open it once, and close it",
        ),
        (
            "<general_tags>a < b</general_tags>",
            "line 1 of the scene: 'a' stands outside of the elements; put it into one",
        ),
        (
            "<general_tags><caption>a < b</caption></general_tags>",
            "line 1 of the scene: a `<` begins no tag; write &lt; for the character",
        ),
    ],
)
def test_what_is_no_scene_is_refused(text: str, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        read_scene(text)
    assert caught.value.message == message


@pytest.mark.parametrize("written", ["\\", "<", "&", "(", " ", ",", "<a", "\\x"])
def test_a_long_run_of_one_character_is_read_at_once(written: str) -> None:
    began = time.process_time()
    run = written * 100_000
    plain_text(run)
    Character(n=run)
    list(marks(run))
    assert time.process_time() - began < 2
