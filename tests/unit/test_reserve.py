"""Renderers kept for urgent images by the time of day."""

from datetime import datetime

import pytest

from farm.errors import SettingsError
from farm.reserve import Warmable, check, in_force, reserved, to_warm
from farm.settings import Reserve

NAMES = ("renderer-0", "renderer-1", "renderer-2")


def holds(rule: Reserve, moment: str) -> bool:
    return in_force([rule], datetime.fromisoformat(moment).timestamp()) is rule


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-11-23T07:59:59+00:00", False),
        ("2026-11-23T08:00:00+00:00", True),
        ("2026-11-23T17:59:59+00:00", True),
        ("2026-11-23T18:00:00+00:00", False),
    ],
)
def test_a_rule_holds_from_its_first_minute_until_before_its_last(moment, expected):
    assert holds(Reserve(renderers=1, hours="08:00-18:00"), moment) is expected


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2026-11-27T21:59:00+00:00", False),  # Friday
        ("2026-11-27T22:00:00+00:00", True),
        ("2026-11-28T05:59:00+00:00", True),  # Saturday morning belongs to Friday's night
        ("2026-11-28T06:00:00+00:00", False),
        ("2026-11-28T23:00:00+00:00", False),  # and Saturday's own night does not count
        ("2026-11-27T01:00:00+00:00", False),  # nor Thursday's
    ],
)
def test_a_night_past_midnight_belongs_to_the_day_it_begins_on(moment, expected):
    assert holds(Reserve(renderers=1, hours="22:00-06:00", days=("fri",)), moment) is expected


def test_hours_that_end_where_they_begin_last_a_whole_day_from_there():
    rule = Reserve(renderers=1, hours="08:00-08:00", days=("mon",))
    assert holds(rule, "2026-11-23T08:00:00+00:00")
    assert holds(rule, "2026-11-24T07:59:00+00:00")
    assert not holds(rule, "2026-11-24T08:00:00+00:00")
    assert not holds(rule, "2026-11-23T07:59:00+00:00")


def test_without_hours_a_rule_holds_all_day():
    rule = Reserve(renderers=1, days=("sun",))
    assert holds(rule, "2026-11-22T00:00:00+00:00")
    assert holds(rule, "2026-11-22T23:59:59+00:00")
    assert not holds(rule, "2026-11-23T00:00:00+00:00")


def test_hours_are_those_of_the_rules_zone_in_winter_and_in_summer():
    rule = Reserve(renderers=1, hours="09:00-10:00", zone="Europe/Berlin")
    assert holds(rule, "2026-01-15T08:30:00+00:00")
    assert not holds(rule, "2026-01-15T07:30:00+00:00")
    assert holds(rule, "2026-07-15T07:30:00+00:00")
    assert not holds(rule, "2026-07-15T08:30:00+00:00")


def test_the_weekday_is_that_of_the_rules_zone():
    rule = Reserve(renderers=1, hours="08:00-09:00", days=("mon",), zone="Asia/Tokyo")
    assert holds(rule, "2026-11-22T23:30:00+00:00")  # Sunday in UTC, Monday morning in Tokyo


def test_when_clocks_are_set_forward_a_night_is_an_hour_shorter():
    rule = Reserve(renderers=1, hours="01:00-04:00", zone="Europe/Berlin")  # 2026-03-29: 02:00 becomes 03:00
    assert [holds(rule, f"2026-03-{at}:30:00+00:00") for at in ("28T23", "29T00", "29T01", "29T02")] == [
        False,
        True,
        True,
        False,
    ]
    assert not any(
        holds(Reserve(renderers=1, hours="02:15-02:45", zone="Europe/Berlin"), f"2026-03-29T{hour:02}:30:00+00:00")
        for hour in range(24)
    )


def test_when_clocks_are_set_back_the_repeated_hour_counts_twice():
    rule = Reserve(renderers=1, hours="02:00-03:00", zone="Europe/Berlin")  # 2026-10-25: 03:00 becomes 02:00
    assert [holds(rule, f"2026-10-{at}:30:00+00:00") for at in ("24T23", "25T00", "25T01", "25T02")] == [
        False,
        True,
        True,
        False,
    ]


def test_of_several_rules_that_hold_the_first_counts():
    day = Reserve(renderers=2, hours="08:00-18:00")
    always = Reserve(renderers=1)
    noon, night = (datetime.fromisoformat(f"2026-11-23T{at}:00+00:00").timestamp() for at in ("12:00", "02:00"))
    assert in_force([day, always], noon) is day
    assert in_force([day, always], night) is always
    assert in_force([], noon) is None


def test_the_first_slots_are_kept_and_never_more_than_there_are():
    assert reserved(Reserve(renderers=2), NAMES) == {"renderer-0", "renderer-1"}
    assert reserved(Reserve(renderers=9), NAMES) == set(NAMES)
    assert reserved(None, NAMES) == set()


def test_a_zone_that_is_not_known_is_refused_by_name():
    with pytest.raises(
        SettingsError, match=r"setting reserve: there is no time zone 'Europe/Atlantis' on this machine"
    ):
        check([Reserve(), Reserve(zone="Europe/Atlantis")])
    with pytest.raises(SettingsError, match=r"'\.\./etc/passwd'"):
        check([Reserve(zone="../etc/passwd")])


def views(*loaded: str | None, busy: tuple[int, ...] = ()) -> list[Warmable]:
    return [Warmable(NAMES[number], model, number not in busy) for number, model in enumerate(loaded)]


KEPT = frozenset(NAMES[:2])


def test_kept_renderers_have_the_models_in_turn():
    rule = Reserve(renderers=2, warm=("a", "b"))
    assert to_warm(rule, views(None, None, None), KEPT) == [("renderer-0", "a"), ("renderer-1", "b")]
    assert to_warm(rule, views("a", "c", None), KEPT) == [("renderer-1", "b")]
    assert to_warm(rule, views("a", "b", None), KEPT) == []
    one = Reserve(renderers=2, warm=("a",))
    assert to_warm(one, views(None, None, None), KEPT) == [("renderer-0", "a"), ("renderer-1", "a")]


def test_a_kept_renderer_that_is_busy_is_told_later():
    assert to_warm(Reserve(renderers=2, warm=("a",)), views("b", None, None, busy=(0,)), KEPT) == [("renderer-1", "a")]


def test_models_left_over_go_to_idle_renderers_unless_one_has_them():
    rule = Reserve(renderers=2, warm=("a", "b", "c"))
    assert to_warm(rule, views("a", "b", None), KEPT) == [("renderer-2", "c")]
    assert to_warm(rule, views("a", "b", "c"), KEPT) == []
    assert to_warm(rule, views("a", "b", None, busy=(2,)), KEPT) == []


def test_without_kept_renderers_models_go_to_idle_ones_first_to_those_without_a_model():
    rule = Reserve(warm=("a",))
    assert to_warm(rule, views("b", None, "c"), frozenset()) == [("renderer-1", "a")]
    assert to_warm(rule, views("b", "a", "c", busy=(1,)), frozenset()) == []
    assert to_warm(rule, views("b", "b", "c", busy=(0, 1)), frozenset()) == [("renderer-2", "a")]


def test_a_kept_slot_whose_renderer_is_missing_leaves_its_model_to_another():
    found = [Warmable("renderer-1", None, True), Warmable("renderer-2", None, True)]
    assert to_warm(Reserve(renderers=2, warm=("a", "b")), found, KEPT) == [("renderer-1", "a"), ("renderer-2", "b")]


def test_nothing_is_warmed_without_a_rule():
    assert to_warm(None, views(None, None, None), frozenset()) == []
    assert to_warm(Reserve(renderers=1), views(None, None, None), frozenset(NAMES[:1])) == []
