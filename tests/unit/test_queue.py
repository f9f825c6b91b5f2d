"""Which job goes next."""

from farm.queue import Waiting, next_job


def test_nothing_waits():
    assert next_job([], loaded_model="sketch") is None


def test_priority_beats_the_loaded_model_and_that_beats_age():
    old = Waiting("a", 50, "2026-01-01", "flux")
    loaded = Waiting("b", 50, "2026-01-02", "sketch")
    urgent = Waiting("c", 60, "2026-01-03", "flux")
    assert next_job([old, loaded, urgent], loaded_model="sketch") == urgent
    assert next_job([old, loaded], loaded_model="sketch") == loaded
    assert next_job([old, loaded], loaded_model=None) == old


def test_equal_jobs_are_ordered_by_run_whatever_order_they_come_in():
    one, two = Waiting("a", 50, "2026-01-01", "m"), Waiting("b", 50, "2026-01-01", "m")
    assert next_job([two, one], loaded_model=None) == next_job([one, two], loaded_model=None) == one
