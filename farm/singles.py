"""Single images of the endpoint, kept like a job's: a record each, and the picture beside it.

    singles/<day>/<id>.json                     who asked for what, and until when it is kept
    singles/<day>/pictures/<id>.png             the picture file

The picture is stored first and goes last, so that a record always has its picture. An id counts the day's milliseconds
down: in key order the newest comes first, and a page costs what it shows. A record past its `keep_until` is there for
nobody from that moment; its objects go with the next sweep.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import Field, ValidationError

from farm.errors import NewerVersionError, ObjectMissingError, RecordError, StoreError, UnknownImageError
from farm.modelcard import RenderParams
from farm.moment import moment
from farm.prefetch import in_order
from farm.provenance import Format
from farm.records import Record
from farm.removal import Removed, remove_objects
from farm.storage.base import ObjectInfo, ObjectStore

PREFIX = "singles/"
CONTENT_TYPES: dict[Format, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
SCANNED = 2000
"""Records read for one page at most, whatever it looks for; the next page goes on from there."""
LATE_S = 3600.0
"""A record is swept so long after its time, so that a clock that is a little slow still finds its picture."""

_DAY_MS = 24 * 3600 * 1000
_ID = re.compile(r"[0-9]{8}-[0-9]{8}-[0-9a-f]{12}")
_THREADS = 8
_TRIES = 100

Bits = Callable[[int], int]
"""From a count of bits to that many random ones."""


class Single(Record):
    """One image of the endpoint. `owner` and `key`: who asked, and by the key of which id, empty without one."""

    id: str
    created_at: str = Field(description="ISO 8601, UTC")
    keep_until: str | None = Field(description="ISO 8601, UTC; None for good")
    owner: str
    key: str = ""
    user: str | None = Field(default=None, description="whom the asking program says that it asks for")
    model: str
    prompt: str
    seed: int
    params: RenderParams
    format: Format
    size_bytes: int = Field(ge=0)
    sha256: str
    seconds: float = Field(ge=0, description="its share of its batch's time on the device")
    renderer: str
    device: str
    flag: str | None = Field(default=None, description="`black` or `flat` where it looks wrong")
    warnings: str | None = Field(default=None, description="codes of the advice on the prompt, with commas between")

    def expired(self, now: float) -> bool:
        """Whether its time is over at `now`, Unix seconds."""
        return self.keep_until is not None and moment(self.keep_until).timestamp() <= now

    @property
    def content_type(self) -> str:
        """Media type of the picture file."""
        return CONTENT_TYPES[self.format]

    @property
    def picture_key(self) -> str:
        """Key of the picture in the store."""
        return f"{PREFIX}{_day(self.id)}/pictures/{self.id}.{self.format}"


@dataclass(frozen=True, slots=True)
class Page:
    """Some singles, newest first. `after`: what to ask for next, None where this was all.

    May hold fewer than were asked for, even none, where a search passed over many. `damaged`: ids whose records cannot be
    read.
    """

    singles: tuple[Single, ...]
    after: str | None
    damaged: tuple[str, ...] = ()


@dataclass(slots=True)
class Swept:
    """What a sweep removed, or would, and keys of records that cannot be read and are kept, with the reason."""

    removed: Removed = field(default_factory=Removed)
    kept: list[tuple[str, str]] = field(default_factory=list)


def single_id(now: float, bits: Bits = secrets.randbits) -> str:
    """Make the id of an image drawn at `now`, Unix seconds."""
    at = datetime.fromtimestamp(now, UTC)
    passed = ((at.hour * 60 + at.minute) * 60 + at.second) * 1000 + at.microsecond // 1000
    return f"{at:%Y%m%d}-{_DAY_MS - passed:08d}-{bits(48):012x}"


def until(now: float, days: float) -> str:
    """Return the moment `days` from `now` (Unix seconds), as `keep_until` has it."""
    return datetime.fromtimestamp(now + days * 24 * 3600, UTC).isoformat(timespec="seconds")


def is_id(text: str) -> bool:
    """Whether a text could be an image's id."""
    return _ID.fullmatch(text) is not None


class Singles:
    """The kept images of one store. Blocks, safe with threads. `now` is Unix seconds everywhere."""

    def __init__(self, store: ObjectStore):
        self._store = store

    def put(self, single: Single, data: bytes) -> None:
        """Keep an image; it is there once this returns. Putting it again changes nothing."""
        self._store.put(single.picture_key, data, content_type=single.content_type)
        self._store.put(_record_key(single.id), single.model_dump_json().encode(), content_type="application/json")

    def get(self, id: str, *, now: float) -> Single:
        """Look an image up. Raises UnknownImageError, RecordError."""
        try:
            found = self._read(_known_id(id))
        except ObjectMissingError as exc:
            raise _unknown(id) from exc
        if found.expired(now):
            raise _unknown(id)
        return found

    def picture(self, single: Single) -> bytes:
        """Read the picture file. Raises UnknownImageError where it was deleted meanwhile."""
        try:
            return self._store.get(single.picture_key)
        except ObjectMissingError as exc:
            raise _unknown(single.id) from exc

    def link(self, single: Single, expires_s: int) -> str | None:
        """Return a URL of the picture that needs no key, None where the store has no such thing."""
        return self._store.presign(single.picture_key, expires_s)

    def list(
        self,
        *,
        now: float,
        limit: int,
        after: str | None = None,
        owner: str | None = None,
        model: str | None = None,
        words: str = "",
    ) -> Page:
        """Return up to `limit` images, newest first, from the one that follows the id `after`.

        `words`: each must stand somewhere in the prompt, in either case. Raises UnknownImageError where `after` is no id.
        """
        wanted = words.casefold().split()
        found: list[Single] = []
        damaged: list[str] = []
        last, scanned = None, 0
        ids = self._ids(_known_id(after) if after is not None else None)
        with closing(in_order(self._readable, ids, threads=_THREADS, in_hand=2)) as records:
            for last, single in records:
                scanned += 1
                if isinstance(single, RecordError):
                    damaged.append(last)
                elif (
                    single is not None
                    and not single.expired(now)
                    and owner in (None, single.owner)
                    and model in (None, single.model)
                    and all(word in single.prompt.casefold() for word in wanted)
                ):
                    found.append(single)
                if len(found) >= limit or scanned >= SCANNED:
                    break
            else:
                last = None
        return Page(tuple(found), last, tuple(damaged))

    def keep(self, id: str, *, now: float, days: float | None) -> Single:
        """Keep an image for `days` from now, or for good. Raises UnknownImageError, RecordError."""
        keep_until = None if days is None else until(now, days)
        key = _record_key(_known_id(id))
        for _ in range(_TRIES):
            info = self._store.head(key)
            changed = self.get(id, now=now).model_copy(update={"keep_until": keep_until})
            if info is not None and self._store.replace(key, changed.model_dump_json().encode(), info.etag):
                return changed
        raise StoreError(f"{self._store.url}/{key} was changed {_TRIES} times in a row by others; try again")

    def delete(self, id: str, *, now: float) -> None:
        """Delete an image for good. Raises UnknownImageError where there is none, RecordError."""
        self._remove(self.get(id, now=now))

    def sweep(self, *, now: float, before: float, remove: bool = True) -> Swept:
        """Remove, or only count, what is past its time, and pictures without a record.

        Those go that were written before `before`, the store's own time: a younger one may still get its record.
        """
        swept = Swept()
        for day in self._days():
            for records, pictures in self._expired(day, now, swept):
                if remove:
                    # The records first: a picture without one is garbage, a record without its picture a broken link.
                    remove_objects(self._store, records)
                    remove_objects(self._store, pictures)
                swept.removed += Removed.of([*records, *pictures])
            lost = list(self._lost(day, before))
            swept.removed += remove_objects(self._store, lost) if remove else Removed.of(lost)
        return swept

    def _days(self) -> Sequence[str]:
        return sorted((day for day in self._store.folders(PREFIX) if re.fullmatch(r"[0-9]{8}", day)), reverse=True)

    def _ids(self, after: str | None) -> Iterator[str]:
        """Ids from the newest on, or from the one that follows `after`; of one day at a time, as they are taken."""
        for day in self._days():
            if after is not None and day > _day(after):
                continue
            start = _record_key(after) if after is not None and day == _day(after) else ""
            yield from (_id_of(info.key) for info in self._records(day, after=start))

    def _records(self, day: str, *, after: str = "") -> Iterator[ObjectInfo]:
        folder = f"{PREFIX}{day}/"
        for info in self._store.list(folder, after=after):
            if info.key.startswith(f"{folder}pictures/"):
                return
            if info.key.endswith(".json") and _ID.fullmatch(_id_of(info.key)):
                yield info

    def _read(self, id: str) -> Single:
        key = _record_key(id)
        where = f"{self._store.url}/{key}"
        try:
            return Single.model_validate_json(self._store.get(key))
        except NewerVersionError as exc:
            raise NewerVersionError(f"{where}: {exc.message}") from exc
        except ValidationError as exc:
            first = exc.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "whole"
            raise RecordError(
                f"{where}: not a single image ({name}: {first['msg']}); restore the object from a backup, or delete it"
            ) from exc

    def _readable(self, id: str) -> tuple[str, Single | RecordError | None]:
        try:
            return id, self._read(id)
        except ObjectMissingError:  # deleted between the listing and the reading
            return id, None
        except RecordError as exc:
            return id, exc

    def _expired(
        self, day: str, now: float, swept: Swept
    ) -> Iterator[tuple[Sequence[ObjectInfo], Sequence[ObjectInfo]]]:
        """Yield records of a day that are past their time, and their pictures, some at a time."""
        records: list[ObjectInfo] = []
        pictures: list[ObjectInfo] = []

        def read(info: ObjectInfo) -> tuple[ObjectInfo, Single | RecordError | None]:
            return info, self._readable(_id_of(info.key))[1]

        for info, single in in_order(read, self._records(day), threads=_THREADS):
            if isinstance(single, RecordError):
                swept.kept.append((info.key, single.message))
            elif single is not None and single.expired(now - LATE_S):
                records.append(info)
                pictures.append(ObjectInfo(single.picture_key, single.size_bytes, ""))
            if len(records) >= 1000:
                yield records, pictures
                records, pictures = [], []
        if records:
            yield records, pictures

    def _lost(self, day: str, before: float) -> Iterator[ObjectInfo]:
        """Pictures of a day that are old enough and have no record."""
        known: set[str] | None = None
        for info in self._store.list(f"{PREFIX}{day}/pictures/"):
            if 0 < info.modified_at < before:
                known = {_id_of(record.key) for record in self._records(day)} if known is None else known
                if info.key.rpartition("/")[2].partition(".")[0] not in known:
                    yield info

    def _remove(self, single: Single) -> None:
        self._store.delete(_record_key(single.id))
        self._store.delete(single.picture_key)


def _known_id(id: str) -> str:
    """Return `id` where it could be one: nothing else reaches the store. Raises UnknownImageError."""
    if not is_id(id):
        raise _unknown(id)
    return id


def _unknown(id: str) -> UnknownImageError:
    shown = id if len(id) <= 60 else f"{id[:57]}..."
    return UnknownImageError(
        f"no single image {shown!r} is kept; it may have expired: GET /v1/images lists those there are"
    )


def _day(id: str) -> str:
    return id.partition("-")[0]


def _record_key(id: str) -> str:
    return f"{PREFIX}{_day(id)}/{id}.json"


def _id_of(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")
