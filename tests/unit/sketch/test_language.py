import numpy as np
import pytest

from farm.sketch.drawing import sample
from farm.sketch.language import WORDS, Request, Wanted, caption, read, words


def test_captions_read_back_as_the_scene_they_describe() -> None:
    rng = np.random.default_rng(3)
    for _ in range(500):
        scene = sample(rng)
        request = read(caption(scene, rng))
        assert request.background == scene.background
        assert request.relation == scene.relation
        assert [(w.shape, w.colour) for w in request.things] == [(t.shape, t.colour) for t in scene.things]


def test_captions_stay_within_the_vocabulary() -> None:
    rng = np.random.default_rng(4)
    assert all(set(words(caption(sample(rng), rng))) <= set(WORDS) for _ in range(500))


def test_captions_can_leave_colours_out() -> None:
    rng = np.random.default_rng(5)
    requests = [read(caption(sample(rng), rng, omit=1.0)) for _ in range(20)]
    assert all(request.background is None for request in requests)
    assert all(wanted.colour is None for request in requests for wanted in request.things)


RED, BLUE = Wanted("circle", "red", None), Wanted("star", "blue", "small")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle left of a small blue star on a white background", Request("white", (RED, BLUE), "left of")),
        ("A RED ball, to the LEFT of a tiny blue star!", Request(None, (RED, BLUE), "left of")),
        ("white background with a red circle and a small blue star", Request("white", (RED, BLUE), "left of")),
        ("masterpiece, best quality, a red circle under a little blue star", Request(None, (RED, BLUE), "below")),
        ("3 red circles on a grey canvas", Request("gray", (RED, RED, RED), None)),
        ("a star", Request(None, (Wanted("star", None, None),), None)),
        ("a photo of a dog riding a bicycle", Request(None, (), None)),
        ("", Request(None, (), None)),
    ],
)
def test_prompt_is_read(prompt: str, expected: Request) -> None:
    assert read(prompt) == expected
