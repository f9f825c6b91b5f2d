"""What prompts are advised against."""

import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.lint import LOOKED_AT, MOST, Advice, is_structured, lint_prompt, prompt_codes
from farm.scene import Character, GeneralTags, Scene

GOOD = Scene(
    (
        Character(n="a", gender="1girl", appearance="blue_hair, long_twintails, teal_eyes", pose="standing"),
        Character(n="b", gender="1boy", appearance="black_hair, short_hair, red_eyes", pose="leaning_against_wall"),
    ),
    GeneralTags(count="1girl, 1boy", style="anime_style"),
).xml()


def advice(text: str, family: str = "newbie", max_tokens: int | None = None) -> list[tuple[str, str]]:
    return [(one.code, one.where) for one in lint_prompt(text, family=family, max_tokens=max_tokens)]


def texts(text: str, family: str = "newbie", max_tokens: int | None = None) -> list[str]:
    return [one.text for one in lint_prompt(text, family=family, max_tokens=max_tokens)]


def character(**elements: str) -> str:
    return Scene((Character(**elements),)).xml()


def test_a_sound_scene_and_plain_words_draw_no_advice() -> None:
    assert lint_prompt(GOOD, family="newbie", max_tokens=512) == ()
    assert lint_prompt("1girl, blue hair, teal eyes", family="newbie", max_tokens=512) == ()
    assert lint_prompt("a cat that loves you <3, and 2 < 3", family="z-image", max_tokens=512) == ()


def test_what_the_models_users_write_around_the_blocks_is_let_be() -> None:
    text = f"<img>\n{GOOD}\n<caption>\nTwo friends.\n</caption>\n</img>"
    assert lint_prompt(text, family="newbie") == ()
    assert lint_prompt("<danbooru_tags>lowres, bad_hands</danbooru_tags>", family="newbie") == ()
    assert lint_prompt(character(body_type="tall", interaction="hugging"), family="newbie") == ()
    assert advice("<img><character_1><gender>girl</gender></character_1></img>") == [
        ("unknown_gender", "character_1.gender")
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "<character_1>\n<n>a\n<gender>1girl</gender>\n</character_1>",
            [
                Advice("wrong_nesting", "<gender> stands inside of <n>, which holds tags alone", "line 3"),
                Advice("unclosed_tag", "<n> is not closed before </character_1>; write </n> at its end", "line 2"),
            ],
        ),
        (
            "<general_tags><style>anime</style>",
            [Advice("unclosed_tag", "<general_tags> is never closed; write </general_tags>", "line 1")],
        ),
        (
            "<general_tags><style>anime</styel></style></general_tags>",
            [Advice("wrong_nesting", "</styel> closes nothing, perhaps </style>; mend it, or take it out", "line 1")],
        ),
        (
            "<charcter_1><n>a</n></charcter_1>",
            [
                Advice(
                    "unknown_tag",
                    "<charcter_1> is no element that the model knows; did you mean character_1?",
                    "line 1",
                )
            ],
        ),
        (
            "<character_1>\n<apearance>tall</apearance>\n</character_1>",
            [Advice("unknown_tag", "<apearance> is no element of <character_1>; did you mean appearance?", "line 2")],
        ),
        (
            "<general_tags><gender>1girl</gender></general_tags>",
            [
                Advice(
                    "misplaced_tag",
                    "<gender> is no element of <general_tags> but of <character_N>; put it in there",
                    "line 1",
                )
            ],
        ),
        (
            "<style>anime</style>",
            [Advice("misplaced_tag", "<style> stands outside of <general_tags>; put it in there", "line 1")],
        ),
        (
            "<character_1><pose></pose></character_1>",
            [Advice("empty_element", "<pose> says nothing; fill it, or leave it out", "character_1.pose")],
        ),
        (
            "<general_tags></general_tags>",
            [Advice("empty_element", "<general_tags> says nothing; fill it, or leave it out", "line 1")],
        ),
        (
            "<general_tags><caption>1 < 2</caption></general_tags>",
            [Advice("stray_bracket", "a `<` begins no tag; write &lt; for the character, or end the tag", "line 1")],
        ),
        (
            "<general_tags>\n<style>a</style>\n<style>b</style>\n</general_tags>",
            [Advice("duplicate_tag", "<style> stands in <general_tags> on line 2 already; join them", "line 3")],
        ),
    ],
)
def test_broken_xml_is_said_where_it_breaks(text: str, found: list[Advice]) -> None:
    assert list(lint_prompt(text, family="newbie")) == found


@pytest.mark.parametrize(
    ("gender", "said"),
    [
        ("girl", "'girl' is no gender that the model knows and falls back to 1girl; write that"),
        ("Male", "'Male' is no gender that the model knows and falls back to 1boy; write that"),
        ("女孩", "'女孩' is no gender that the model knows and falls back to 1girl; write that"),
        ("robot", "'robot' is no gender that the model knows; write 1girl, 1boy or 1other"),
    ],
)
def test_an_unknown_gender_says_what_it_falls_back_to(gender: str, said: str) -> None:
    assert lint_prompt(character(gender=gender), family="newbie") == (
        Advice("unknown_gender", said, "character_1.gender"),
    )


@pytest.mark.parametrize("gender", ["1girl", "1boy", "1other", "2girls", "multiple_boys", "1girl, solo", "1GIRL"])
def test_genders_that_the_model_knows(gender: str) -> None:
    assert advice(character(gender=gender)) == []


def test_an_unknown_pose_falls_back_to_standing_and_an_action_may_be_anything() -> None:
    assert lint_prompt(character(pose="standing_confident"), family="newbie") == (
        Advice(
            "unknown_pose",
            "'standing_confident' is no pose that the model knows and falls back to standing; write one of standing, "
            "sitting, jumping, waving, leaning_against_wall, or say it in <action>",
            "character_1.pose",
        ),
    )
    assert advice(character(pose="Leaning against wall")) == []
    assert advice(character(action="standing_confident, doing_cartwheels")) == []


@pytest.mark.parametrize(
    ("appearance", "codes"),
    [
        ("a, b, c, d, e", []),
        ("a, b, c, d, e, f", ["many_attributes"]),
        ("a、b，c,d、e，f", ["many_attributes"]),
        ("a, b, c, d, e, f, g, h", ["many_attributes"]),
        ("a, b, c, d, e, f, g, h, i", ["too_many_attributes"]),
        ("a, , ,, b", []),
    ],
)
def test_crowded_characters_are_advised_against(appearance: str, codes: list[str]) -> None:
    assert [code for code, _ in advice(character(appearance=appearance))] == codes


def test_a_crowded_character_is_told_the_number() -> None:
    assert texts(character(appearance=",".join("abcdefghi"))) == [
        "9 attributes; above 8 details run together: keep 5 or fewer"
    ]
    assert texts(character(appearance=",".join("abcdef"))) == ["6 attributes; 5 or fewer come out more surely"]


def test_names_and_numbers_that_stand_twice() -> None:
    twins = Scene((Character(n="Miku"), Character(n="miku"))).xml()
    assert lint_prompt(twins, family="newbie") == (
        Advice(
            "duplicate_character",
            "character_2 has the name of character_1, 'miku'; name one otherwise",
            "character_2.n",
        ),
    )
    doubled = "<character_1><n>a</n></character_1>\n<character_1><n>b</n></character_1>"
    assert ("duplicate_character", "line 2") in advice(doubled)


@pytest.mark.parametrize(
    ("text", "brands"),
    [
        ("portrait, shot on Canon EOS R5, 85mm f/1.2", "Canon"),
        ("nike_shoes and a GUCCI bag, nike again", "nike, GUCCI"),
        ("手持佳能相机的女孩", "佳能"),
    ],
)
def test_brands_are_named(text: str, brands: str) -> None:
    assert lint_prompt(text, family="qwen-image") == (
        Advice("brand", f"names a brand ({brands}), which tends to be drawn as a logo; take it out"),
    )


@pytest.mark.parametrize(
    "text", ["the canon of Bach", "a puma in the grass", "sonypunk", "Canonical", "a supreme being"]
)
def test_words_that_only_look_like_brands_are_let_be(text: str) -> None:
    assert advice(text, "qwen-image") == []


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_xml_for_a_model_that_does_not_read_it(family: str) -> None:
    assert texts(character(gender="girl"), family) == [
        f"a structured prompt, which models of the family {family} take for plain words; say it in sentences"
    ]


def test_nothing_is_said_of_xml_for_a_pipeline_that_nobody_knows() -> None:
    assert advice(character(gender="girl"), "diffusers") == []


def test_only_what_is_likely_too_long_is_called_so() -> None:
    english = "a red circle on a white background, " * 80  # about 720 tokens of eight or nine to a line
    assert advice(english, "z-image", max_tokens=512) == [("long_prompt", "")]
    assert texts(english, "z-image", max_tokens=512) == [
        "is likely longer than the 512 tokens that the model reads (about 640); what stands at its end is cut off: shorten it"
    ]
    assert advice(english[: len(english) // 2], "z-image", max_tokens=512) == []
    assert advice("一只猫坐在窗台上" * 100, "qwen-image", max_tokens=512) == [("long_prompt", "")]


def test_text_that_begins_with_a_tag_and_closes_one_was_meant_to_be_xml() -> None:
    assert is_structured("<charcter_1><n>a</n></charcter_1>")
    assert is_structured("cinematic <character_1>")
    assert not is_structured("<lora:detail:0.8> a cat")
    assert not is_structured("a <b> c")


def test_codes_are_of_every_prompt_and_each_once() -> None:
    known = partial(prompt_codes, family="newbie", max_tokens=512)
    assert known(character(gender="girl", pose="flying", clothing="nike")) == "unknown_gender,unknown_pose,brand"
    assert known(character(appearance="red_hair", pose="flying, falling")) == "unknown_pose"
    assert known(GOOD) is None
    assert known("a Nike shoe") == "brand"
    assert known("a shoe") is None
    assert known("word " * 600) == "long_prompt"


@given(st.text("<>/abn_character_1general_tags,&;\\()\n ", max_size=200))
def test_any_text_is_looked_at_without_a_fault(text: str) -> None:
    for family in ("newbie", "z-image"):
        assert len(lint_prompt(f"<character_1>{text}", family=family, max_tokens=10)) <= MOST


@pytest.mark.parametrize(
    "text",
    [
        "<general_tags>" + "<" * 1_000_000,
        "<general_tags>" + "<a" * 500_000,
        "<general_tags>" + "<x>" * 300_000,
        "<zz>" * 200_000 + "</zz>" * 200_000,
        "<general_tags>" + "&" * 1_000_000,
        "x" * 2_000_000,
    ],
)
def test_a_huge_prompt_takes_little_time_and_says_little(text: str) -> None:
    began = time.process_time()
    found = lint_prompt(text, family="newbie", max_tokens=512)
    assert time.process_time() - began < 1.0
    assert 0 < len(found) <= MOST


@pytest.mark.parametrize("kept", range(1, 9))
def test_a_tag_where_the_looking_ends_is_no_fault(kept: int) -> None:
    before = "<general_tags><caption>" + "a" * 60_000
    text = before[: LOOKED_AT - kept] + "</caption></general_tags>"
    assert advice(text) == []


def test_a_stray_bracket_before_the_looking_ends_is_still_said() -> None:
    text = "<general_tags>\n2 < 3<caption>" + "a" * 60_000
    assert ("stray_bracket", "line 2") in advice(text)


def test_a_word_where_the_looking_ends_is_no_brand() -> None:
    assert advice("a" * (LOOKED_AT - 6) + " Canonical", "z-image") == []
    assert advice("a" * (LOOKED_AT - 6) + " Canon, red", "z-image") == [("brand", "")]
