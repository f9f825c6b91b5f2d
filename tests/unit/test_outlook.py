"""Whether limits will be kept."""

import pytest

from farm.limits import Limits
from farm.outlook import Outlook, outlook

NOW = "2026-11-21T10:00:00+00:00"


def look(limits: Limits, *, left: int = 3600, speed: float | None = 1.0, renderers: int = 1) -> Outlook:
    return outlook(limits, now=NOW, images=3600, left=left, seconds_per_image=speed, renderers=renderers, batch=4)


@pytest.mark.parametrize(
    ("renderers", "in_time", "needed"),
    [(1, False, 2), (2, True, 2), (3, True, 2)],
)
def test_the_time_that_is_left_is_compared_with_what_renderers_need(renderers: int, in_time: bool, needed: int) -> None:
    found = look(Limits(priority=50, finish_by="2026-11-21T18:40+08:00"), renderers=renderers)
    assert (found.seconds_left, found.seconds_needed) == (2400.0, 3600.0 / renderers)
    assert (found.in_time, found.renderers_needed) == (in_time, needed)


def test_no_number_of_renderers_ends_in_less_than_a_batch_or_in_the_past() -> None:
    soon = look(Limits(priority=50, finish_by="2026-11-21T10:00:02Z"))
    assert (soon.in_time, soon.renderers_needed) == (False, None)
    passed = look(Limits(priority=50, finish_by="2026-11-21T09:00Z"))
    assert (passed.seconds_left, passed.in_time, passed.renderers_needed) == (-3600.0, False, None)


def test_without_a_limit_or_a_speed_nothing_is_said() -> None:
    free = look(Limits(priority=50))
    assert (free.in_time, free.within_budget, free.seconds_left, free.renderers_needed) == (None, None, None, None)
    blind = look(Limits(priority=50, finish_by="2026-12-01T09:00Z", gpu_hours=1.0), speed=None)
    assert (blind.in_time, blind.within_budget, blind.gpu_hours_needed) == (None, None, None)


@pytest.mark.parametrize(
    ("gpu_hours", "max_images", "speed", "within"),
    [
        (1.0, None, 1.0, True),
        (0.9, None, 1.0, False),
        (None, 3600, 1.0, True),
        (None, 3599, 1.0, False),
        (2.0, 3599, 1.0, False),
        (2.0, 3599, None, False),
        (2.0, 3600, None, None),
    ],
)
def test_the_budget_is_that_of_the_whole_job(
    gpu_hours: float | None, max_images: int | None, speed: float | None, within: bool | None
) -> None:
    found = look(Limits(priority=50, gpu_hours=gpu_hours, max_images=max_images), left=10, speed=speed)
    assert found.images_needed == 3600
    assert found.within_budget is within
