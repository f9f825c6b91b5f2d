"""Which images a pass is over: all of a job, a list, a pilot spread over the job, or all that the pilot left out.

Arithmetic alone: only a list and a pilot have arrays, and theirs are as long as they are, never as long as the job.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Indexes = npt.NDArray[np.int64]

_GOLDEN = 2_654_435_769  # 2**32 over the golden ratio: multiples of it fall evenly, whatever stretch of them is taken
_NOT_IN_IT = -1


class Selection(Protocol):
    """The images of a pass, in ascending order of their indexes. `images`: how many."""

    @property
    def images(self) -> int: ...

    def part(self, start: int, stop: int) -> Sequence[int]:
        """Return the indexes at places `start` to `stop` of the pass; what lies past its end is left out."""

    def places(self, indexes: Indexes) -> Indexes:
        """Return where each image stands in the pass; -1 where it is not in it."""


@dataclass(frozen=True, slots=True)
class Everything:
    """All images of a job."""

    images: int

    def part(self, start: int, stop: int) -> Sequence[int]:
        return range(start, min(stop, self.images))

    def places(self, indexes: Indexes) -> Indexes:
        return indexes


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """The images of an ascending list."""

    indexes: Indexes

    @property
    def images(self) -> int:
        return len(self.indexes)

    def part(self, start: int, stop: int) -> Sequence[int]:
        found: list[int] = self.indexes[start:stop].tolist()
        return found

    def places(self, indexes: Indexes) -> Indexes:
        at = np.searchsorted(self.indexes, indexes)
        inside = np.minimum(at, len(self.indexes) - 1)
        return np.where(self.indexes[inside] == indexes, inside, _NOT_IN_IT)


@dataclass(frozen=True, slots=True, eq=False)
class Others:
    """All images of a job but those of an ascending list."""

    job_images: int
    left_out: Indexes

    @property
    def images(self) -> int:
        return self.job_images - len(self.left_out)

    def part(self, start: int, stop: int) -> Sequence[int]:
        places = np.arange(start, min(stop, self.images), dtype=np.int64)
        before = self.left_out - np.arange(len(self.left_out), dtype=np.int64)
        found: list[int] = (places + np.searchsorted(before, places, side="right")).tolist()
        return found

    def places(self, indexes: Indexes) -> Indexes:
        before = np.searchsorted(self.left_out, indexes)
        return np.where(Listed(self.left_out).places(indexes) < 0, indexes - before, _NOT_IN_IT)


@lru_cache(maxsize=8)
def pilot_indexes(images: int, pilot: int) -> Indexes:
    """Return `pilot` indexes below `images`, ascending: one from each of as many stretches of equal length.

    Where in its stretch an image lies changes by the golden ratio from one to the next. Equal steps would meet only one
    point of a sweep, or one seed, wherever the step is a multiple of how many there are.
    """
    number = np.arange(pilot + 1, dtype=np.int64)
    length, more = divmod(images, pilot)
    edges = number * length + number * more // pilot
    shares = (number[:-1] * _GOLDEN % 2**32) / 2**32
    found = edges[:-1] + (np.diff(edges) * shares).astype(np.int64)
    found.setflags(write=False)
    return found


def images_of_shards(done: npt.NDArray[np.bool_], *, images: int, shard_images: int) -> int:
    """Return how many images the shards that are done have, in a pass of so many images: the last may be short."""
    found = int(done.sum()) * shard_images
    if len(done) and done[-1]:
        found -= len(done) * shard_images - images
    return found
