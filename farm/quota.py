"""What a key may still use: images a minute, at once, and per UTC day.

Knows no store and no clock: `now` is monotonic seconds, `wall` Unix seconds, which may jump. What was used this minute is
forgotten with the process; what was used on a day is kept in the store as a `QuotaDay`, by whoever owns this.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import Field, ValidationError

from farm.errors import RecordError, RequestError
from farm.portion import Allowance, Refusal
from farm.records import Record

MINUTE_S = 60.0
DAYS_KEPT = 3
"""Days that are kept in memory: a clock that is set back and forth finds them again."""
RETRY_S = 1.0


class QuotaDay(Record):
    """Images by the id of the key that asked for them, on one UTC day."""

    day: str = Field(description="YYYY-MM-DD")
    images: dict[str, int]


@dataclass(slots=True)
class _Bucket:
    """Images that may be asked for at once; it fills up over a minute."""

    level: float
    at: float


class Quotas:
    """What every key has used."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._days: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._recalled: set[str] = set()
        self._unsaved: set[str] = set()

    # Asking

    def refusal(
        self, key: str, allowance: Allowance, images: int, *, at_once: int, freed_s: float, now: float, wall: float
    ) -> Refusal | None:
        """Why a key may not have so many images now, or None; counts nothing.

        `at_once`: images that it has in hand, and `freed_s` the seconds until enough of them should be drawn. Raises
        RequestError where no waiting would help.
        """
        _can_ever(allowance.images_at_once, images, "at once")
        _can_ever(allowance.images_per_minute, images, "per minute")
        refusal = self.day_refusal(key, allowance, images, wall=wall)
        if refusal is not None:
            return refusal
        most = allowance.images_at_once
        if most is not None and at_once + images > most:
            words = f"this key may have {most} images at once, and has {at_once}; wait for some, or ask for fewer"
            return Refusal("at_once", words, max(freed_s, RETRY_S))
        rate = allowance.images_per_minute
        if rate is not None:
            short = images - self._level(key, rate, now)
            if short > 0:
                words = f"this key may have {rate} images a minute, and has used them"
                return Refusal("rate", words, short * MINUTE_S / rate)
        return None

    def day_refusal(self, key: str, allowance: Allowance, images: int, *, wall: float) -> Refusal | None:
        """Why a key may not have so many images today, or None; counts nothing. Raises RequestError as `refusal` does."""
        quota = allowance.images_per_day
        if quota is None:
            return None
        _can_ever(quota, images, "per day")
        used = self._days.get(day_of(wall), {}).get(key, 0)
        if used + images <= quota:
            return None
        words = f"this key may have {quota} images a day, and has used {used}; the next day begins at 00:00 UTC"
        return Refusal("quota", words, max(_until_midnight_s(wall), RETRY_S))

    def take(self, key: str, allowance: Allowance, images: int, *, now: float, wall: float) -> None:
        """Count images that a key was given."""
        rate = allowance.images_per_minute
        if rate is not None:
            self._buckets[key] = _Bucket(self._level(key, rate, now) - images, now)
        self.take_day(key, images, wall=wall)

    def take_day(self, key: str, images: int, *, wall: float) -> None:
        """Count images for the day alone."""
        if not key:
            return
        day = self._day(day_of(wall))
        day[key] = day.get(key, 0) + images
        self._unsaved.add(day_of(wall))

    def forget(self, *, now: float) -> None:
        """Forget what is full again; to be called now and then."""
        for key in [key for key, bucket in self._buckets.items() if now - bucket.at >= MINUTE_S]:
            del self._buckets[key]

    # Keeping

    def to_recall(self, wall: float) -> tuple[str, ...]:
        """Days whose record was not read yet: today, and those that are not saved."""
        return tuple(sorted({day_of(wall), *self._unsaved} - self._recalled))

    def recall(self, day: str, images: Mapping[str, int]) -> None:
        """Add what was used of a day before this process; once."""
        if day in self._recalled:
            return
        self._recalled.add(day)
        counts = self._day(day)
        for key, used in images.items():
            counts[key] = counts.get(key, 0) + used

    def to_save(self) -> tuple[QuotaDay, ...]:
        """Days whose record is behind; only those that were recalled, so that none is overwritten unread."""
        return tuple(QuotaDay(day=day, images=dict(self._days[day])) for day in sorted(self._unsaved & self._recalled))

    def saved(self, record: QuotaDay) -> None:
        """A day's record is in the store; what was counted since is still to save."""
        if self._days.get(record.day, {}) == record.images:
            self._unsaved.discard(record.day)

    # Inside

    def _level(self, key: str, rate: int, now: float) -> float:
        bucket = self._buckets.get(key)
        if bucket is None:
            return float(rate)
        return min(float(rate), bucket.level + max(now - bucket.at, 0.0) * rate / MINUTE_S)

    def _day(self, day: str) -> dict[str, int]:
        counts = self._days.setdefault(day, {})
        self._days.move_to_end(day)
        for old in list(self._days)[:-DAYS_KEPT]:
            if old not in self._unsaved:
                del self._days[old]
                self._recalled.discard(old)
        return counts


def day_of(wall: float) -> str:
    """The UTC day of an instant, Unix seconds."""
    return datetime.fromtimestamp(wall, UTC).date().isoformat()


def key_of(day: str) -> str:
    """Where in the store a day's record is."""
    return f"quotas/{day}.json"


def read_day(data: bytes, day: str) -> Mapping[str, int]:
    """What a day's record says. Raises RecordError where it is damaged, or another day's, and NewerVersionError."""
    try:
        record = QuotaDay.model_validate_json(data)
    except ValidationError as exc:
        raise RecordError(f"{key_of(day)}: {exc.errors()[0]['msg']}; it is passed over, and written anew") from exc
    if record.day != day:
        raise RecordError(f"{key_of(day)}: it is of {record.day}; it is passed over, and written anew")
    if min(record.images.values(), default=0) < 0:
        raise RecordError(f"{key_of(day)}: it counts fewer than no images; it is passed over, and written anew")
    return record.images


def _can_ever(limit: int | None, images: int, per: str) -> None:
    if limit is not None and images > limit:
        raise RequestError(f"{images} images are more than this key may have {per}, which is {limit}; ask for fewer")


def _until_midnight_s(wall: float) -> float:
    now = datetime.fromtimestamp(wall, UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return (midnight - now).total_seconds()
