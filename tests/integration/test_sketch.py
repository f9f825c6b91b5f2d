"""Render with the bundled model itself, through the path that its users take."""

import numpy as np
import pytest
from diffusers import ZImagePipeline

from farm.sketch.adherence import load, render, unseen_prompts, verdicts
from farm.sketch.judge import shares


@pytest.fixture(scope="module")
def pipeline() -> ZImagePipeline:
    return load()


def test_pictures_follow_their_prompts(pipeline: ZImagePipeline) -> None:
    prompts = unseen_prompts(48)
    pictures = render(pipeline, prompts, num_inference_steps=8, guidance_scale=2.0)
    result = shares(verdicts(prompts, pictures))
    assert result["background"] >= 0.95, result
    assert result["colours"] >= 0.9, result
    assert result["count"] >= 0.9, result
    assert result["places"] >= 0.75, result
    assert result["shapes"] >= 0.75, result


def test_equal_seeds_give_equal_pictures(pipeline: ZImagePipeline) -> None:
    first, second = (
        render(pipeline, ["a red circle on a white background"], num_inference_steps=2, guidance_scale=2.0)[0]
        for _ in range(2)
    )
    assert np.array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize(
    "prompt",
    ["", "a photo of a dog", "狗", "word " * 100, "a red circle, " * 20],
    ids=["empty", "dog", "dog (zh)", "long", "repeated"],
)
def test_any_prompt_gives_a_picture(pipeline: ZImagePipeline, prompt: str) -> None:
    picture = render(pipeline, [prompt], num_inference_steps=2, guidance_scale=2.0)[0]
    assert picture.size == (64, 64)
