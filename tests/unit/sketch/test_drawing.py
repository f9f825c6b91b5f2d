import itertools

import numpy as np
import pytest

from farm.sketch.drawing import COLOURS, SHAPES, SIDE, Scene, Thing, draw, outline, sample


def test_equal_seeds_give_equal_scenes_and_pixels() -> None:
    first, second = (sample(np.random.default_rng(5)) for _ in range(2))
    assert first == second
    assert draw(first).tobytes() == draw(second).tobytes()
    assert sample(np.random.default_rng(6)) != first


def test_things_never_touch_one_another_or_the_border() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = sample(rng)
        corners = [np.array(outline(t.shape, x=t.x, y=t.y, radius=t.radius)) for t in scene.things]
        for points in corners:
            assert points.min() >= 1
            assert points.max() <= SIDE - 1
        for first, second in itertools.pairwise(corners):
            apart = np.maximum(second.min(0) - first.max(0), first.min(0) - second.max(0)).max()
            assert apart >= 2


def test_every_thing_differs_from_its_background() -> None:
    rng = np.random.default_rng(1)
    assert all(
        thing.colour != scene.background for scene in (sample(rng) for _ in range(300)) for thing in scene.things
    )


def test_every_shape_and_colour_is_drawn() -> None:
    rng = np.random.default_rng(2)
    scenes = [sample(rng) for _ in range(300)]
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)
    assert {scene.background for scene in scenes} == set(COLOURS)


def test_colours_are_far_enough_apart_to_be_told() -> None:
    values = np.array(list(COLOURS.values()), dtype=float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert distances[~np.eye(len(values), dtype=bool)].min() > 70


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_drawn_in_its_colour_where_the_scene_says(shape: str) -> None:
    picture = draw(Scene("white", (Thing(shape, "blue", "medium", 20.0, 40.0, 12.0),)))
    assert picture.size == (SIDE, SIDE)
    assert picture.getpixel((20, 40)) == COLOURS["blue"]
    assert picture.getpixel((50, 10)) == COLOURS["white"]
