"""Whether a job will keep its limits, reckoned from the speed that is known before it is rendered. Pure."""

import math
from dataclasses import dataclass

from farm.limits import Limits


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a job needs against what its limits leave it; None where there is no such limit or the speed is not known.

    `seconds_left`: until `finish_by`. `seconds_needed`: for what is left to render, on the renderers there are.
    `renderers_needed`: how many would be in time; None too where no number would. `gpu_hours_needed`, `images_needed`: of
    the whole job, against its budget. Loading models, failures and the wait for a pilot's approval are not in it.
    """

    limits: Limits
    seconds_left: float | None
    seconds_needed: float | None
    renderers_needed: int | None
    gpu_hours_needed: float | None
    images_needed: int

    @property
    def in_time(self) -> bool | None:
        """Whether `finish_by` is met."""
        if self.seconds_left is None or self.seconds_needed is None:
            return None
        return self.seconds_needed <= self.seconds_left

    @property
    def within_budget(self) -> bool | None:
        """Whether the budget suffices for every image."""
        found: list[bool | None] = []
        if self.limits.max_images is not None:
            found.append(self.images_needed <= self.limits.max_images)
        if self.limits.gpu_hours is not None:
            hours = self.gpu_hours_needed
            found.append(None if hours is None else hours <= self.limits.gpu_hours)
        return False if False in found else None if None in found or not found else True


def outlook(
    limits: Limits, *, now: str, images: int, left: int, seconds_per_image: float | None, renderers: int, batch: int
) -> Outlook:
    """Reckon what a job of so many `images`, `left` of them to render, needs. `seconds_per_image`: of one renderer."""
    seconds_left = limits.seconds_left(now)
    work = None if seconds_per_image is None else seconds_per_image * left
    needed = None
    if work is not None and seconds_left is not None and seconds_left > 0:
        needed = math.ceil(work / seconds_left)
        if needed > math.ceil(
            left / batch
        ):  # a batch is drawn by one renderer, so more than there are batches do nothing
            needed = None
    return Outlook(
        limits=limits,
        seconds_left=seconds_left,
        seconds_needed=None if work is None else work / renderers,
        renderers_needed=needed,
        gpu_hours_needed=None if seconds_per_image is None else seconds_per_image * images / 3600,
        images_needed=images,
    )
