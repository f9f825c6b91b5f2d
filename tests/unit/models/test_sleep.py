"""The family that sleeps."""

import numpy as np

from farm.models.sleep import SleepFamily
from tests.drawing import spec


def test_it_sleeps_ten_milliseconds_a_step_and_image() -> None:
    slept: list[float] = []
    steps: list[tuple[int, int]] = []
    family = SleepFamily(slept.append)
    specs = [spec(i, num_inference_steps=5) for i in range(3)]
    family.denoise(
        specs, family.noise(specs), positive=[], negative=[], on_step=lambda step, of: steps.append((step, of))
    )
    assert np.allclose(slept, [0.03] * 5)
    assert steps[-1] == (5, 5)


def test_its_pictures_follow_from_their_seeds() -> None:
    family = SleepFamily()
    one, two, again = family.noise([spec(0, seed=1), spec(1, seed=2, width=32), spec(2, seed=1)])
    assert np.array_equal(one, again)
    assert two.shape == (64, 32, 3)
    assert family.decode((one, two), spec(0)).finite == (True, True)
