"""What follows when a shard did not come back whole: who is to blame, and what is tried next.

Pure: counts and failures come in, a decision goes out. Three kinds of trouble are told apart. The *store's* (nobody's
image is at fault: wait and try again), the *renderer's* (this machine cannot run the plan: let others), and the *work's*
(an image ends the process: narrow it down until that image fails alone).
"""

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
ERRORS_BEFORE_STALL = 5
"""Unexplained failures of one shard in a row before the job waits for a person."""
STORE_WAIT_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pauses after the 1st, 2nd, ... store failure in a row; the last repeats."""
STORE_PATIENCE_S = 300.0
"""A store that has not answered for this long stalls the job; `farm render` again goes on."""

RENDERER_CODES = frozenset({"numerics", "does_not_fit", "model_card"})
STORE_RETRY_CODES = frozenset({"store_unavailable"})
STORE_STOP_CODES = frozenset({"store_denied", "bucket_missing", "store_full", "record", "newer_version", "store"})


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """`again`: lease the shard anew after `delay_s`. `elsewhere`: not to this renderer. `stall`: stop the job."""

    action: Literal["again", "elsewhere", "stall"]
    delay_s: float = 0.0


def after_failure(code: str, *, in_a_row: int, failing_for_s: float) -> RetryDecision:
    """Decide after a renderer gave a shard back with an error.

    `in_a_row`: failures since the last success, this one counted; `failing_for_s`: since the first of them.
    """
    if code in RENDERER_CODES:
        return RetryDecision("elsewhere")
    if code in STORE_STOP_CODES:
        return RetryDecision("stall")
    if code in STORE_RETRY_CODES:
        if failing_for_s >= STORE_PATIENCE_S:
            return RetryDecision("stall")
        return RetryDecision("again", STORE_WAIT_S[min(in_a_row, len(STORE_WAIT_S)) - 1])
    return RetryDecision("stall" if in_a_row >= ERRORS_BEFORE_STALL else "again")


@dataclass(slots=True)
class Blame:
    """Deaths counted against the batches and images that were in hand, for one shard."""

    batches: dict[tuple[int, ...], int] = field(default_factory=dict)
    images: dict[int, int] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    skip: set[int] = field(default_factory=set)

    def died(self, in_hand: tuple[int, ...]) -> None:
        """Count one death of a renderer that was rendering the images `in_hand`."""
        if len(in_hand) == 1 and in_hand[0] in self.alone:
            index = in_hand[0]
            self.images[index] = self.images.get(index, 0) + 1
            if self.images[index] >= DEATHS_ALONE_BEFORE_SKIP:
                self.skip.add(index)
            return
        self.batches[in_hand] = self.batches.get(in_hand, 0) + 1
        if self.batches[in_hand] >= DEATHS_BEFORE_ALONE:
            self.alone.update(in_hand)
