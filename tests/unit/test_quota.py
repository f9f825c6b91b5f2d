"""What a key may use: by the minute, at once, and by the UTC day."""

from datetime import datetime

import pytest

from farm.errors import NewerVersionError, RecordError, RequestError
from farm.portion import Allowance
from farm.quota import QuotaDay, Quotas, day_of, key_of, read_day

NOON = datetime.fromisoformat("2026-11-21T12:00:00+00:00").timestamp()
TODAY = "2026-11-21"
DAY_S = 86400.0


def ask(quotas: Quotas, allowance: Allowance, images: int = 1, *, key="k", at_once=0, freed_s=0.0, now=0.0, wall=NOON):
    """Ask, and take where nothing is refused; returns the code and when to ask again."""
    refusal = quotas.refusal(key, allowance, images, at_once=at_once, freed_s=freed_s, now=now, wall=wall)
    if refusal is None:
        quotas.take(key, allowance, images, now=now, wall=wall)
        return None
    return refusal.code, refusal.retry_after_s


def test_without_limits_nothing_is_refused():
    quotas = Quotas()
    assert all(ask(quotas, Allowance(), 1000) is None for _ in range(100))


def test_a_minutes_images_may_come_at_once_and_then_as_the_minute_passes():
    quotas, allowance = Quotas(), Allowance(images_per_minute=6)
    assert [ask(quotas, allowance, 2, now=1.0) for _ in range(3)] == [None] * 3
    assert ask(quotas, allowance, 2, now=1.0) == ("rate", 20.0)
    assert ask(quotas, allowance, 2, now=20.5) == ("rate", pytest.approx(0.5))
    assert ask(quotas, allowance, 2, now=21.0) is None
    assert ask(quotas, allowance, 6, now=21.0) == ("rate", 60.0)
    assert ask(quotas, allowance, 6, now=81.0) is None


def test_asking_again_when_told_is_never_too_soon():
    quotas, allowance = Quotas(), Allowance(images_per_minute=7)
    now = 3.3
    for _ in range(200):
        refused = ask(quotas, allowance, 3, now=now)
        if refused is not None:
            now += refused[1] + 1e-6
            assert ask(quotas, allowance, 3, now=now) is None


def test_a_refusal_counts_nothing():
    quotas, allowance = Quotas(), Allowance(images_per_minute=4, images_per_day=10)
    assert ask(quotas, allowance, 3) is None
    assert ask(quotas, allowance, 2) == ("rate", 15.0)
    assert ask(quotas, allowance, 1) is None
    assert quotas.to_save() == ()
    quotas.recall(TODAY, {})
    assert quotas.to_save() == (QuotaDay(day=TODAY, images={"k": 4}),)


def test_keys_do_not_use_up_each_others():
    quotas, allowance = Quotas(), Allowance(images_per_minute=1, images_per_day=1)
    assert ask(quotas, allowance, key="a") is None
    assert ask(quotas, allowance, key="b") is None
    assert ask(quotas, allowance, key="a")[0] == "quota"


def test_images_in_hand_are_refused_until_some_are_drawn():
    quotas, allowance = Quotas(), Allowance(images_at_once=4)
    assert ask(quotas, allowance, 2, at_once=2) is None
    assert ask(quotas, allowance, 3, at_once=2, freed_s=7.5) == ("at_once", 7.5)
    assert ask(quotas, allowance, 1, at_once=4, freed_s=0.1) == ("at_once", 1.0)


def test_the_words_name_the_limit_and_what_is_used():
    quotas, allowance = Quotas(), Allowance(images_at_once=4, images_per_day=5, images_per_minute=9)
    refusal = quotas.refusal("k", allowance, 3, at_once=2, freed_s=1, now=0, wall=NOON)
    assert refusal.message == "this key may have 4 images at once, and has 2; wait for some, or ask for fewer"
    quotas.take_day("k", 4, wall=NOON)
    refusal = quotas.day_refusal("k", allowance, 2, wall=NOON)
    assert refusal.message == "this key may have 5 images a day, and has used 4; the next day begins at 00:00 UTC"


@pytest.mark.parametrize(
    ("allowance", "message"),
    [
        (Allowance(images_at_once=4), "5 images are more than this key may have at once, which is 4; ask for fewer"),
        (Allowance(images_per_minute=4), "5 images are more than this key may have per minute, which is 4"),
        (Allowance(images_per_day=4), "5 images are more than this key may have per day, which is 4"),
    ],
)
def test_what_no_waiting_brings_is_an_error_and_no_refusal(allowance, message):
    with pytest.raises(RequestError, match=message):
        ask(Quotas(), allowance, 5)


def test_a_days_quota_ends_at_midnight_utc_and_says_when():
    quotas, allowance = Quotas(), Allowance(images_per_day=3)
    late = datetime.fromisoformat("2026-11-21T23:59:30+00:00").timestamp()
    assert ask(quotas, allowance, 3, wall=late) is None
    assert ask(quotas, allowance, 1, wall=late) == ("quota", 30.0)
    assert ask(quotas, allowance, 1, wall=late + 29.9) == ("quota", 1.0)
    assert ask(quotas, allowance, 3, wall=late + 30) is None
    assert ask(quotas, allowance, 1, wall=late + 30) == ("quota", DAY_S)


def test_a_clock_that_is_set_back_and_forth_gives_no_day_twice():
    quotas, allowance = Quotas(), Allowance(images_per_day=2)
    for wall in (NOON, NOON + DAY_S, NOON - DAY_S):
        assert ask(quotas, allowance, 2, wall=wall) is None
        quotas.recall(day_of(wall), {})
    for wall in (NOON, NOON + DAY_S, NOON - DAY_S):
        assert ask(quotas, allowance, 1, wall=wall)[0] == "quota"


def test_days_that_are_saved_leave_memory_and_are_read_again_when_a_clock_goes_back():
    quotas, allowance = Quotas(), Allowance(images_per_day=2)
    for day in range(5):
        quotas.recall(day_of(NOON + day * DAY_S), {})
        assert ask(quotas, allowance, 2, wall=NOON + day * DAY_S) is None
        for record in quotas.to_save():
            quotas.saved(record)
    assert quotas.to_recall(NOON + 4 * DAY_S) == ()
    assert quotas.to_recall(NOON) == (TODAY,)
    quotas.recall(TODAY, {"k": 2})
    assert ask(quotas, allowance, 1, wall=NOON)[0] == "quota"


def test_the_rate_is_kept_by_a_clock_that_nobody_sets():
    quotas, allowance = Quotas(), Allowance(images_per_minute=1)
    assert ask(quotas, allowance, now=10.0) is None
    assert ask(quotas, allowance, now=10.0, wall=NOON + DAY_S) == ("rate", 60.0)


def test_what_was_used_before_a_restart_is_added_to_what_was_used_since_and_once():
    quotas, allowance = Quotas(), Allowance(images_per_day=10)
    assert quotas.to_recall(NOON) == (TODAY,)
    assert ask(quotas, allowance, 3) is None
    assert quotas.to_save() == (), "a day that was not read is not overwritten"
    quotas.recall(TODAY, {"k": 5, "other": 1})
    quotas.recall(TODAY, {"k": 5, "other": 1})
    assert quotas.to_recall(NOON) == ()
    assert ask(quotas, allowance, 3)[0] == "quota"
    assert quotas.to_save() == (QuotaDay(day=TODAY, images={"k": 8, "other": 1}),)


def test_what_is_counted_while_it_is_saved_is_saved_next():
    quotas = Quotas()
    quotas.recall(TODAY, {})
    quotas.take_day("k", 1, wall=NOON)
    (record,) = quotas.to_save()
    quotas.take_day("k", 1, wall=NOON)
    quotas.saved(record)
    (record,) = quotas.to_save()
    assert record.images == {"k": 2}
    quotas.saved(record)
    assert quotas.to_save() == ()


def test_nothing_is_kept_of_who_has_no_key():
    quotas = Quotas()
    quotas.recall(TODAY, {})
    assert ask(quotas, Allowance(), 5, key="") is None
    assert quotas.to_save() == ()


def test_a_full_bucket_is_forgotten():
    quotas, allowance = Quotas(), Allowance(images_per_minute=2)
    assert ask(quotas, allowance, 2, now=0.0) is None
    quotas.forget(now=59.0)
    assert ask(quotas, allowance, 2, now=59.0) == ("rate", pytest.approx(1.0))
    quotas.forget(now=60.0)
    assert quotas._buckets == {}
    assert ask(quotas, allowance, 2, now=60.0) is None


def test_a_days_record_is_read_as_it_was_written():
    record = QuotaDay(day=TODAY, images={"k": 3})
    assert read_day(record.model_dump_json().encode(), TODAY) == {"k": 3}
    assert key_of(TODAY) == "quotas/2026-11-21.json"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", r"quotas/2026-11-21\.json: Invalid JSON"),
        (b"", r"quotas/2026-11-21\.json: Invalid JSON"),
        (b'{"day": "2026-11-21", "images": {"k": "many"}}', "valid integer"),
        (b'{"day": "2026-11-20", "images": {}}', r"quotas/2026-11-21\.json: it is of 2026-11-20; it is passed over"),
        (b'{"day": "2026-11-21", "images": {"k": -5}}', "counts fewer than no images"),
    ],
)
def test_a_damaged_record_or_another_days_is_told(data, message):
    with pytest.raises(RecordError, match=message):
        read_day(data, TODAY)


def test_a_newer_farms_record_is_told():
    with pytest.raises(NewerVersionError, match="was written by a newer farm"):
        read_day(b'{"version": 99, "day": "2026-11-21", "images": {}}', TODAY)
