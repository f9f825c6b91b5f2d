"""The manifests that ship, examples and published cases: they load, fit their cards, and warn of what they should."""

import json
from pathlib import Path
from typing import Any

import pytest

from farm.cardparts import Scheduler
from farm.cli.app import main
from farm.manifest import Manifest, load_manifest
from farm.modelcard import ModelCard, RenderParams, find_card, merged, param_fault
from farm.request import wish_of
from farm.scene import read_scene
from farm.settings import Settings

MANIFESTS = Path(__file__).parents[2] / "manifests"
ARTICLES = MANIFESTS / "articles"

WARNED: dict[str, tuple[str, ...]] = {
    "quickstart.yaml": (),
    "examples/inline.yaml": (),
    "examples/keyed.yaml": (),
    "examples/pilot.yaml": (),
    "examples/random.yaml": (),
    "examples/rows.yaml": (),
    "articles/newbie-accuracy.yaml": ("licence", "preset"),
    "articles/newbie-chinese.yaml": ("licence", "preset"),
    "articles/newbie-cyberpunk.yaml": ("licence", "preset", "unknown_pose"),
    "articles/newbie-rounds.yaml": ("licence", "preset"),
    "articles/qwen-deliver.yaml": (),
    "articles/qwen-explore.yaml": (),
    "articles/qwen-guidance.yaml": ("preset",),
    "articles/qwen-produce.yaml": (),
    "articles/qwen-steps.yaml": ("preset", "brand"),
    "articles/zimage-anime.yaml": ("preset",),
    "articles/zimage-art.yaml": ("preset",),
    "articles/zimage-authors.yaml": (),
    "articles/zimage-chosen.yaml": (),
    "articles/zimage-concept.yaml": ("preset",),
    "articles/zimage-explore.yaml": (),
    "articles/zimage-photo.yaml": ("preset",),
}
"""Manifest -> codes of what `farm lint` says of it."""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FARM_MODELS", raising=False)
    monkeypatch.setenv("FARM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-weights"))


def read(name: str) -> Manifest:
    return load_manifest(MANIFESTS / name).manifest


def prompts(name: str) -> tuple[str, ...]:
    texts = read(f"articles/{name}.yaml").prompts
    assert isinstance(texts, tuple)
    return texts


def drawn(name: str) -> list[RenderParams]:
    """Return the parameters of every sweep point, as they are rendered."""
    loaded = load_manifest(MANIFESTS / name)
    wish = wish_of(loaded, find_card(loaded.manifest.model, Settings()))
    return [merged(wish.params, point) for point in wish.points]


def figures(name: str) -> list[tuple[int, int, int, float]]:
    return [
        (one.width, one.height, one.num_inference_steps, one.guidance_scale) for one in drawn(f"articles/{name}.yaml")
    ]


def test_examples_need_the_bundled_model_alone() -> None:
    assert {read(name).model for name in WARNED if not name.startswith("articles/")} == {"sketch"}


def test_every_manifest_is_in_the_table() -> None:
    files = [file for folder in (".", "examples", "articles") for file in (MANIFESTS / folder).glob("*.yaml")]
    assert {str(file.relative_to(MANIFESTS)) for file in files} == set(WARNED)


@pytest.mark.parametrize("name", WARNED)
def test_manifest_is_linted_without_weights_and_warns_of_no_more_than_it_should(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(("lint", str(MANIFESTS / name), "--json")) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert tuple(one["code"] for one in said["warnings"]) == WARNED[name]
    assert said["whole"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WARNED)
def test_manifest_asks_for_what_its_card_can_draw(name: str) -> None:
    manifest = read(name)
    card = find_card(manifest.model, Settings())
    assert [param_fault(card, params) for params in drawn(name)] == [None] * len(drawn(name))
    assert not any(params.negative_prompt.startswith("@") for params in drawn(name))


@pytest.mark.parametrize("name", [name for name in WARNED if name.startswith("articles/")])
def test_manifest_of_an_article_is_called_like_its_file_and_begins_by_saying_what_to_look_at(name: str) -> None:
    assert read(name).name == Path(name).stem
    first, second = (MANIFESTS / name).read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith("# ")
    assert "look" in f"{first}\n{second}".lower()


def test_accuracy_says_two_characters_in_tags_in_short_xml_and_in_full_xml() -> None:
    plain, short, full = prompts("newbie-accuracy")
    assert plain == "1girl, blue_hair, long_twintails, teal_eyes, 1boy, black_hair, short_hair, red_eyes, anime_style"
    for text, elements in ((short, {"n", "appearance"}), (full, {"n", "gender", "appearance", "clothing", "pose"})):
        scene = read_scene(text)
        assert [set(one.given()) for one in scene.characters] == [elements, elements]
        assert [one.appearance for one in scene.characters] == [
            "blue_hair, long_twintails, teal_eyes",
            "black_hair, short_hair, red_eyes",
        ]
        assert scene.general_tags.given() == {"style": "anime_style"}
    assert figures("newbie-accuracy") == [(1024, 1024, 50, 5.0)]


def test_cyberpunk_pair_comes_out_of_the_shared_file() -> None:
    article, known = (read_scene(text) for text in prompts("newbie-cyberpunk"))
    assert [one.pose for one in article.characters] == ["standing_confident", "leaning_against_wall"]
    assert [one.pose for one in known.characters] == ["standing", "leaning_against_wall"]
    assert all(len(one.appearance.split(", ")) == 3 for one in article.characters)
    assert article.general_tags == known.general_tags
    assert article.general_tags.given() == {
        "count": "1girl, 1boy",
        "style": "cyberpunk_anime, neon_lights, rain_wet_streets",
        "quality": "masterpiece, best_quality, ultra_detailed",
    }


def test_chinese_reaches_the_model_as_it_was_written() -> None:
    chinese, english = (read_scene(text) for text in prompts("newbie-chinese"))
    assert chinese.characters[0].appearance == "蓝色头发, 长双马尾, 青色眼睛"
    assert chinese.general_tags.background == "雨后的街道, 霓虹灯"
    assert [set(one.given()) for one in chinese.characters] == [set(one.given()) for one in english.characters]


def test_protocol_is_three_rounds_of_five_pictures_of_50_steps() -> None:
    seeds = read("articles/newbie-rounds.yaml").seeds
    assert isinstance(seeds, tuple)
    assert [seed // 100 for seed in seeds] == [1] * 5 + [2] * 5 + [3] * 5
    assert figures("newbie-rounds") == [(1024, 1024, 50, 5.0)]


@pytest.mark.parametrize(
    ("scene", "words", "guidance", "steps", "negative"),
    [
        ("anime", "动漫少女，粉色长发，蓝色眼睛，站在盛开的樱花树下", 7.0, 30, "low quality, blurry, extra fingers"),
        ("photo", "一只金毛寻回犬坐在草地上，阳光明媚", 7.5, 40, "blurry, distorted"),
        ("art", "山间日出，云海翻腾，油画风格", 8.0, 50, "dull, low contrast"),
        ("concept", "一只现代风格的咖啡杯放在木质桌面上，光线柔和", 9.0, 60, "reflections, heavy shadows"),
    ],
)
def test_light_mode_s_scene_has_its_own_figures_and_is_drawn_with_the_authors_too(
    scene: str, words: str, guidance: float, steps: int, negative: str
) -> None:
    assert prompts(f"zimage-{scene}") == (words,)
    assert figures(f"zimage-{scene}") == [(512, 512, steps, guidance)]
    assert drawn(f"articles/zimage-{scene}.yaml")[0].negative_prompt == negative
    assert words in prompts("zimage-authors")
    assert figures("zimage-authors") == [(512, 512, 8, 0)]


def test_chosen_seeds_were_explored_with_the_same_words() -> None:
    for explored, chosen in (
        ("zimage-explore", "zimage-chosen"),
        ("qwen-explore", "qwen-produce"),
        ("qwen-produce", "qwen-deliver"),
    ):
        before, after = (read(f"articles/{name}.yaml").seeds for name in (explored, chosen))
        assert isinstance(before, tuple)
        assert isinstance(after, tuple)
        assert set(after) < set(before)
        assert prompts(explored) == prompts(chosen)
    assert figures("zimage-explore") == [(512, 512, 8, 0)]
    assert figures("zimage-chosen") == [(1024, 1024, 8, 0)]


def test_portrait_is_drawn_with_20_40_and_60_steps_of_one_seed() -> None:
    manifest = read("articles/qwen-steps.yaml")
    assert manifest.seeds == (123456789,)
    assert figures("qwen-steps") == [(1024, 1024, steps, 7.0) for steps in (20, 40, 60)]
    assert {one.negative_prompt for one in drawn("articles/qwen-steps.yaml")} == {
        "deformed, blurry, low quality, text, watermark, extra limbs, disfigured"
    }
    (text,) = prompts("qwen-steps")
    for words in (
        "photorealistic",
        "East Asian woman",
        "light blue linen shirt",
        "sunlit bamboo forest",
        "85 mm f/1.2",
    ):
        assert words in text


def test_decision_is_20_40_or_60_steps_at_one_size_without_a_brand() -> None:
    names = ("qwen-explore", "qwen-produce", "qwen-deliver")
    assert [figures(name) for name in names] == [[(1024, 1024, steps, 4.0)] for steps in (20, 40, 60)]
    assert [read(f"articles/{name}.yaml").preset for name in names] == ["draft", "standard", "final"]
    assert figures("qwen-guidance") == [(1024, 1024, 40, guidance) for guidance in (7.0, 6.5, 4.0)]
    assert {prompts(name) for name in (*names, "qwen-guidance")} == {prompts("qwen-guidance")}


def test_sampler_that_the_portrait_names_is_one_that_a_card_may_have() -> None:
    assert "scheduler: {name: flow-dpm++}" in (ARTICLES / "qwen-steps.yaml").read_text()
    card = find_card("qwen-image-2512", Settings()).model_dump() | {"scheduler": {"name": "flow-dpm++"}}
    assert ModelCard.model_validate(card).scheduler == Scheduler(name="flow-dpm++")
