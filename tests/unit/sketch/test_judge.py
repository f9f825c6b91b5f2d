import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from farm.sketch import judge as judge_module
from farm.sketch.drawing import SIDE, Scene, Thing, draw
from farm.sketch.judge import judge, judge_drawings, look, shares
from farm.sketch.language import read

PROMPT = "a red circle left of a blue star on a white background"
SCENE = Scene(
    "white",
    (
        Thing("circle", "red", "medium", 16.0, 32.0, 12.0),
        Thing("star", "blue", "medium", 48.0, 32.0, 12.0),
    ),
    "left of",
)


def with_first(scene: Scene, **changes: object) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))


def test_judge_is_right_about_drawings() -> None:
    result = judge_drawings(200, seed=9)
    assert all(share >= 0.99 for share in result.values()), result


def test_right_picture_is_right_in_every_respect() -> None:
    verdict = judge(draw(SCENE), read(PROMPT))
    assert (verdict.background, verdict.colours, verdict.count, verdict.places, verdict.shapes) == (True,) * 5
    assert verdict.everything


@pytest.mark.parametrize(
    ("scene", "wrong"),
    [
        (replace(SCENE, background="gray"), {"background"}),
        (with_first(SCENE, colour="orange"), {"colours"}),
        (with_first(SCENE, shape="diamond"), {"shapes"}),
        (replace(SCENE, things=(replace(SCENE.things[0], x=48.0), replace(SCENE.things[1], x=16.0))), {"places"}),
        (replace(SCENE, things=SCENE.things[:1]), {"colours", "count", "places", "shapes"}),
        (
            replace(SCENE, things=(*SCENE.things, Thing("square", "black", "small", 32.0, 54.0, 8.0))),
            {"colours", "count", "places", "shapes"},
        ),
    ],
    ids=["background", "colour", "shape", "place", "one missing", "one too many"],
)
def test_mutation_is_caught(scene: Scene, wrong: set[str]) -> None:
    verdict = judge(draw(scene), read(PROMPT))
    respects = ("background", "colours", "count", "places", "shapes")
    assert {respect for respect in respects if not getattr(verdict, respect)} == wrong
    assert not verdict.everything


def test_blob_is_no_shape() -> None:
    blob = Image.new("RGB", (SIDE, SIDE), "white")
    blob.paste((214, 36, 40), (10, 20, 54, 26))
    assert [thing.shape for thing in look(blob).things] == ["unknown"]


def test_picture_without_one_background_colour_has_none() -> None:
    halves = Image.new("RGB", (SIDE, SIDE), "white")
    halves.paste((36, 82, 214), (0, 0, 32, SIDE))
    assert look(halves).background is None


def test_noise_is_judged_without_failing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert not judge(Image.fromarray(noise), read(PROMPT)).everything


def test_what_a_prompt_leaves_open_is_not_judged() -> None:
    verdict = judge(draw(SCENE), read("a cat"))
    assert (verdict.background, verdict.colours, verdict.count, verdict.places, verdict.shapes) == (None,) * 5
    assert shares([verdict])["everything"] == 1.0


def test_command_prints_a_table_and_a_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["judge", "--drawings", "--count", "20"])
    judge_module.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| | background | colours |")
    assert json.loads(lines[-1])["drawings"] == 20
