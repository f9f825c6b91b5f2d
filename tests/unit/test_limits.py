"""What a manifest stated and what was said since."""

from farm.limits import Changes, Limits, limits_of, restated, stated
from farm.manifest import Manifest
from farm.records import Standing

BASE = {"name": "job", "model": "m", "prompts": ["a"]}


def manifest(**fields: object) -> Manifest:
    return Manifest.model_validate(BASE | fields)


def test_what_was_said_last_holds_over_the_manifest() -> None:
    written = manifest(priority=60, finish_by="2026-12-01T09:00Z", budget={"gpu_hours": 2})
    assert limits_of(written, Standing()) == Limits(60, "2026-12-01T09:00:00+00:00", 2.0, None)
    said = Standing(priority=0, finish_by="2027-01-01T00:00Z", max_images=9)
    assert limits_of(written, said) == Limits(0, "2027-01-01T00:00Z", 2.0, 9)
    assert limits_of(manifest(), Standing()) == Limits(50)


def test_a_manifest_has_no_opinion_on_what_it_leaves_out() -> None:
    assert stated(manifest()) == Changes()
    assert stated(manifest(priority=50, budget={"images": 7})) == Changes(priority=50, max_images=7)


def test_differences_are_found_and_said() -> None:
    limits = Limits(50, "2026-12-01T09:00+08:00", 2.0, None)
    wanted = Changes(priority=80, finish_by="2026-12-01T01:00Z", gpu_hours=2.0, max_images=9)
    differing = limits.differing(wanted)
    assert differing == Changes(priority=80, max_images=9)
    assert limits.words(differing) == ("priority: 50 -> 80", "budget.images: none -> 9")
    assert limits.unlike(Changes(gpu_hours=3.0)) == ("finish_by: 2026-12-01T09:00+08:00", "budget.gpu_hours: 2")


def test_moments_are_those_of_the_clock() -> None:
    limits = Limits(50, "2026-12-01T09:00+08:00")
    assert limits.finish_by_s == 1796086800.0
    assert limits.seconds_left("2026-12-01T00:59:00+00:00") == 60.0
    assert limits.seconds_left("2026-12-01T01:59:00Z") == -3540.0
    assert Limits(50).seconds_left("2026-12-01T01:59:00Z") is None


def test_only_what_was_edited_since_the_planning_is_said_anew():
    planned = manifest(priority=50, budget={"images": 7, "gpu_hours": 1})
    assert restated(planned, planned) == Changes()
    assert restated(manifest(priority=50, budget={"images": 9, "gpu_hours": 1}), planned) == Changes(max_images=9)
    assert restated(manifest(finish_by="2027-01-01T00:00Z"), planned) == Changes(finish_by="2027-01-01T00:00:00+00:00")
