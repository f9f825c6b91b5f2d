"""Which renderers are kept for urgent images at a time of day, and which of them should have which model loaded.

Pure: the time is an argument. A rule's hours are what a clock on the wall of its zone shows: in the night that clocks are
set back its hours may come twice, and in the one that they are set forward not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from farm.errors import SettingsError
from farm.settings import Reserve, Weekday

_DAYS: tuple[str, ...] = get_args(Weekday)
_DAY_MINUTES = 24 * 60


@dataclass(frozen=True, slots=True)
class Warmable:
    """A renderer that may be told to load a model. `idle`: it has neither a lease nor urgent images."""

    renderer: str
    loaded: str | None
    idle: bool


def in_force(rules: Sequence[Reserve], wall: float) -> Reserve | None:
    """The first rule that holds at an instant, Unix seconds. Raises SettingsError for a zone that is not known."""
    return next((rule for rule in rules if _holds(rule, wall)), None)


def reserved(rule: Reserve | None, names: Sequence[str]) -> frozenset[str]:
    """The slots that a rule keeps: the first ones."""
    return frozenset(names[: rule.renderers] if rule else ())


def to_warm(rule: Reserve | None, renderers: Sequence[Warmable], kept: frozenset[str]) -> list[tuple[str, str]]:
    """Which renderer should load which model now, of those that may be told.

    Each of the `kept` ones has one of the rule's models, in turn. A model that is left over, all of them where none is kept,
    goes to an idle renderer, unless one has it.
    """
    if rule is None or not rule.warm:
        return []
    keeping = [one for one in renderers if one.renderer in kept]
    others = [one for one in renderers if one.renderer not in kept]
    wanted = [(one, rule.warm[number % len(rule.warm)]) for number, one in enumerate(keeping)]
    orders = [(one.renderer, model) for one, model in wanted if one.idle and one.loaded != model]
    free = [one for one in others if one.idle and one.loaded not in rule.warm]
    free.sort(key=lambda one: one.loaded is not None)
    for model in rule.warm[len(keeping) :]:
        if free and not any(one.loaded == model for one in others):
            orders.append((free.pop(0).renderer, model))
    return orders


def check(rules: Sequence[Reserve]) -> None:
    """Raise SettingsError for a rule whose time zone is not known here."""
    for rule in rules:
        _zone(rule.zone)


def _holds(rule: Reserve, wall: float) -> bool:
    there = datetime.fromtimestamp(wall, UTC).astimezone(_zone(rule.zone))
    minute = there.hour * 60 + there.minute
    begin, end = (_minutes(text) for text in rule.hours.split("-"))
    if end <= begin:
        end += _DAY_MINUTES
    today, yesterday = there.date(), there.date() - timedelta(days=1)
    return (begin <= minute < end and _is_of(rule, today.weekday())) or (
        begin <= minute + _DAY_MINUTES < end and _is_of(rule, yesterday.weekday())
    )


def _is_of(rule: Reserve, weekday: int) -> bool:
    return _DAYS[weekday] in rule.days


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


@lru_cache(maxsize=64)
def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise SettingsError(
            f"setting reserve: there is no time zone {name!r} on this machine; write one as Europe/Berlin, or UTC"
        ) from exc
