"""What follows when a shard did not come back whole: who is to blame, and what is tried next.

Pure: counts and failures come in, a decision goes out. Three kinds of trouble are told apart. The *store's* (nobody's
image is at fault: wait and try again), the *renderer's* (this machine cannot run the plan: let others), and the *work's*
(an image ends the process: narrow it down until that image fails alone).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

DEATHS_BEFORE_ALONE = 3
"""Deaths with one batch in hand before its images are rendered one at a time."""
DEATHS_ALONE_BEFORE_SKIP = 2
"""Deaths with one image in hand, alone, before that image is given up."""
IDLE_DEATHS_BEFORE_STALL = 4
"""Deaths in a row with no batch finished between them: the model, not an image, ends the process."""
FINALISE_DEATHS_BEFORE_STALL = 3
"""Deaths while the dataset was being written before the job waits for a person."""
DEATHS_BEFORE_CAUTION = 3
"""Deaths at one shard with no image in hand before each of its images is drawn by itself."""
DEATHS_OF_SHARD_BEFORE_STALL = 6
"""Such deaths before the job waits for a person."""
ERRORS_BEFORE_ELSEWHERE = 5
"""Unexplained failures of one renderer at one run in a row before others are left to try."""
WAIT_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""A renderer's pauses after its 1st, 2nd, ... failure in a row at one run; the last repeats."""
STORE_PATIENCE_S = 300.0
"""A renderer that the store has not answered for this long leaves the run to others; `farm render` again goes on."""
ELSEWHERE_S = 300.0
"""After this long a renderer whose failure may have passed is given the run again."""

RENDERER_CODES = frozenset({"numerics", "does_not_fit", "model_card"})
STORE_RETRY_CODES = frozenset({"store_unavailable"})
STORE_STOP_CODES = frozenset({"store_denied", "bucket_missing", "store_full", "record", "newer_version", "store"})


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """`again`: this renderer may have the run again after `delay_s`. `elsewhere`: others should have it till then, and where
    there are none, the job waits for a person."""

    action: Literal["again", "elsewhere"]
    delay_s: float


def after_failure(code: str, *, in_a_row: int, failing_for_s: float) -> RetryDecision:
    """Decide after a renderer gave a shard back with an error.

    `in_a_row`: its failures at this run since its last success there, this one counted; `failing_for_s`: since the first.
    """
    if code in RENDERER_CODES or code in STORE_STOP_CODES:
        return RetryDecision("elsewhere", math.inf)
    tired = failing_for_s >= STORE_PATIENCE_S if code in STORE_RETRY_CODES else in_a_row >= ERRORS_BEFORE_ELSEWHERE
    if tired:
        return RetryDecision("elsewhere", ELSEWHERE_S)
    return RetryDecision("again", WAIT_S[min(in_a_row, len(WAIT_S)) - 1])


@dataclass(slots=True)
class Trouble:
    """A renderer's failures in a row at one run. It gets none of it `until` then; `refusal` is why, for people, where it
    left the run to others."""

    count: int
    since: float
    until: float = 0.0
    refusal: tuple[str, str] | None = None


@dataclass(slots=True)
class Blame:
    """Deaths counted against the batches and images that were in hand, for one shard; `empty` those with none in hand."""

    batches: dict[tuple[int, ...], int] = field(default_factory=dict)
    images: dict[int, int] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    skip: set[int] = field(default_factory=set)
    empty: int = 0

    @property
    def cautious(self) -> bool:
        """Whether each image should be drawn by itself, whatever its batch."""
        return self.empty >= DEATHS_BEFORE_CAUTION

    def died(self, in_hand: tuple[int, ...], *, cautious: bool) -> None:
        """Count one death of a renderer that was rendering the images `in_hand`."""
        if not in_hand:
            self.empty += 1
            return
        if len(in_hand) == 1 and (cautious or in_hand[0] in self.alone):
            index = in_hand[0]
            self.images[index] = self.images.get(index, 0) + 1
            if self.images[index] >= DEATHS_ALONE_BEFORE_SKIP:
                self.skip.add(index)
            return
        self.batches[in_hand] = self.batches.get(in_hand, 0) + 1
        if self.batches[in_hand] >= DEATHS_BEFORE_ALONE:
            self.alone.update(in_hand)
