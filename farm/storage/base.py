"""What the farm asks of an object store, and no more.

Keys are relative to the store's root, `/`-separated, without a leading slash. Knows nothing of jobs. Every method
blocks, may be called from several threads at once, and raises only `farm.errors.StoreError`s.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a listing or a look-up shows it. `etag` changes whenever the content does.

    `modified_at`: Unix seconds by the store's own clock, which no writer's clock has a part in; 0 where it is not known.
    Compare it with that of other objects of the store, never with this machine's time.
    """

    key: str
    size_bytes: int
    etag: str
    modified_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What writes that never ended left in the store, where no listing of objects shows it."""

    count: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What the start-up probe found. `conditional_create`: N racing creates of one key gave one winner."""

    url: str
    conditional_create: bool
    conditional_replace: bool
    free_bytes: int | None


class ObjectStore(Protocol):
    """A bucket, or a folder that behaves like one."""

    url: str

    def get(self, key: str) -> bytes:
        """Return the whole object. Raises ObjectMissingError."""

    def read(self, key: str, start: int, size: int, *, etag: str) -> bytes:
        """Return `size` bytes of an object from `start` on, all of them there. Raises ObjectMissingError where it is gone,
        StoreError where it has another etag by now."""

    def head(self, key: str) -> ObjectInfo | None:
        """Return the object's size and etag, or None where there is no such object."""

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        """Store `data` whole or not at all, replacing what was there. Large objects go up in parts."""

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> bool:
        """Store `data` unless the key exists; one of any number of racing callers gets True.

        A retry that meets its own earlier write reads it back, compares, and returns True. On a store without
        conditional puts this is a look and a plain put, and two racing callers may both get True.
        """

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        """Store `data` if the object still has `etag`; False when it changed or is gone."""

    def delete(self, key: str) -> None:
        """Remove the object; absent is fine."""

    def delete_many(self, keys: Iterable[str]) -> None:
        """Remove the objects, a thousand at a time where the store can; absent is fine.

        A folder that holds nothing any more goes too. Raises for the first that was refused, once the others of its
        thousand were tried.
        """

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix`, in key order (bytewise), those after key `after` only."""

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the names directly under `prefix` (which ends in `/`, or is empty) that have objects below them."""

    def presign(self, key: str, expires_s: int) -> str | None:
        """Return a URL that reads the object without credentials for `expires_s`, or None where there is no such thing."""

    def sweep(self, before: float, *, remove: bool = True) -> Leftovers:
        """Remove, or only count, what writes begun before `before` (the store's own time) never ended.

        Parts of uploads on S3, temporary files in a folder: those of this store's own prefix. Raises StoreDeniedError
        where they may not be listed.
        """

    def free_bytes(self) -> int | None:
        """Return how much more the store takes, or None where nobody knows."""

    def probe(self) -> StoreReport:
        """Write, race, read, list and delete small objects under `probe/`; raise what does not work."""
