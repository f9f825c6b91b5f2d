"""Pilots, what they leave out, and where an image stands in a pass."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.passes import Everything, Listed, Others, images_of_shards, pilot_indexes


@given(images=st.integers(1, 5000), data=st.data())
def test_a_pilot_takes_one_image_of_every_stretch(images: int, data: st.DataObject) -> None:
    pilot = data.draw(st.integers(1, images))
    found = pilot_indexes(images, pilot)
    assert len(found) == pilot
    for place, index in enumerate(found.tolist()):
        assert place * images // pilot <= index < (place + 1) * images // pilot


@given(images=st.integers(2, 3000), shard_images=st.integers(1, 700), data=st.data())
def test_a_pilot_and_the_others_are_all_images_once(images: int, shard_images: int, data: st.DataObject) -> None:
    pilot = pilot_indexes(images, data.draw(st.integers(1, images - 1)))
    others = Others(images, pilot)
    parts = [others.part(start, start + shard_images) for start in range(0, others.images, shard_images)]
    rest = [index for part in parts for index in part]
    assert rest == sorted(set(range(images)) - set(pilot.tolist()))
    every = np.arange(images, dtype=np.int64)
    places = others.places(every)
    assert [int(place) for place in places if place >= 0] == list(range(len(rest)))
    assert every[places < 0].tolist() == pilot.tolist()


def test_a_pilot_meets_every_point_of_a_sweep_and_every_seed() -> None:
    # 1000 prompts, 3 points, 4 seeds: 60 images a stretch, in which equal steps would always meet the first of each.
    found = pilot_indexes(12_000, 200)
    assert set(np.unique(found % 12).tolist()) == set(range(12))
    counts = np.bincount(found % 12)
    assert counts.min() >= 14


def test_a_pilot_of_a_job_at_the_limit_stays_within_it() -> None:
    found = pilot_indexes(2**53, 1000)
    assert (int(found[0]), int(found[-1]) < 2**53, bool((np.diff(found) > 0).all())) == (0, True, True)


def test_places_in_a_list_and_in_everything() -> None:
    asked = np.array([0, 3, 5, 9], dtype=np.int64)
    assert Listed(np.array([3, 7, 9])).places(asked).tolist() == [-1, 0, -1, 2]
    assert Everything(10).places(asked).tolist() == [0, 3, 5, 9]
    assert list(Everything(10).part(8, 12)) == [8, 9]
    assert list(Listed(np.array([3, 7, 9])).part(1, 5)) == [7, 9]


@pytest.mark.parametrize(
    ("done", "images"), [([1, 1, 1], 10), ([1, 0, 1], 6), ([1, 1, 0], 8), ([0, 0, 0], 0), ([0, 0, 1], 2)]
)
def test_images_of_shards_know_the_short_last_one(done: list[int], images: int) -> None:
    assert images_of_shards(np.array(done, dtype=np.bool_), images=10, shard_images=4) == images
