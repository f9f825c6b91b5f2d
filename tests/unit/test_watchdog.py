"""What counts as stuck, on a clock that is passed in."""

from farm.lease import STAGE_LIMIT_S, Report, Stage
from farm.watchdog import LATE_S, Watchdog


def report(ticks: int = 0, *, stage: Stage = "denoise", token: str = "t") -> Report:
    return Report(token, stage, ticks, 0.5, (7,))


def watch(dog: Watchdog, *reports: Report, start: float, seconds: float) -> Report | None:
    """Look once a second at the same reports; returns the first that is stuck."""
    for second in range(int(seconds) + 1):
        found = dog.look(reports, now=start + second)
        if found:
            return found
    return None


def test_a_stage_that_stands_still_longer_than_its_limit_is_stuck():
    limit = STAGE_LIMIT_S["denoise"]
    assert watch(Watchdog(), report(), start=0, seconds=limit) is None
    assert watch(Watchdog(), report(), start=0, seconds=limit + 1) == report()


def test_every_stage_has_its_own_limit():
    dog = Watchdog({**STAGE_LIMIT_S, "load": 50.0, "denoise": 5.0})
    assert watch(dog, report(stage="load"), start=0, seconds=50) is None
    assert watch(dog, report(stage="load"), start=51, seconds=0) == report(stage="load")


def test_a_tick_or_a_new_stage_is_progress():
    dog = Watchdog({**STAGE_LIMIT_S, "denoise": 10.0, "decode": 10.0})
    assert watch(dog, report(1), start=0, seconds=10) is None
    assert watch(dog, report(2), start=11, seconds=10) is None
    assert watch(dog, report(2, stage="decode"), start=22, seconds=10) is None
    assert watch(dog, report(2, stage="decode"), start=33, seconds=0) == report(2, stage="decode")


def test_time_in_which_the_process_itself_stood_still_does_not_count():
    dog = Watchdog({**STAGE_LIMIT_S, "denoise": 10.0})
    assert watch(dog, report(), start=0, seconds=5) is None
    assert dog.look([report()], now=5000) is None
    assert watch(dog, report(), start=5001, seconds=4) is None
    assert watch(dog, report(), start=5006, seconds=LATE_S) == report()


def test_a_lease_that_waits_for_the_device_is_not_stuck_while_another_gets_on_there():
    dog = Watchdog({**STAGE_LIMIT_S, "waiting": 10.0})
    waits = report(stage="waiting", token="w")
    for second in range(100):
        assert dog.look([report(second), waits], now=float(second)) is None
    assert watch(dog, waits, start=100, seconds=11) == waits


def test_a_lease_that_ended_is_forgotten():
    dog = Watchdog({**STAGE_LIMIT_S, "denoise": 10.0})
    assert watch(dog, report(), start=0, seconds=9) is None
    assert dog.look([], now=10) is None
    assert watch(dog, report(), start=11, seconds=9) is None


def test_looks_that_are_always_late_forgive_nothing():
    dog = Watchdog({**STAGE_LIMIT_S, "denoise": 60.0})
    looks = [dog.look((report(),), now=number * (LATE_S + 1)) for number in range(30)]
    assert looks[-1] == report()
