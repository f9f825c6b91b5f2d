"""What a store can do, found by doing it once at start.

Owns the objects under `probe/` for the length of one call. Stores differ in what they do with a condition on a put:
enforce it, refuse it, or ignore it without a word, so that only a race tells.
"""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

from farm.errors import StoreError
from farm.storage.base import ObjectStore

RACERS = 8
ROUNDS = 2

Create = Callable[[str, bytes], bool]
Replace = Callable[[str, bytes, str], bool]


@dataclass(frozen=True, slots=True)
class Conditions:
    """Which conditional puts the store enforces."""

    create: bool
    replace: bool


def probe_store(store: ObjectStore, create: Create, replace: Replace) -> Conditions:
    """Write, race, read, list and delete small objects under `probe/`, then remove them.

    `create` and `replace` are the store's own conditional puts without any look beforehand. Raises the store's own
    error for what it refuses, StoreError for what it does wrongly.
    """
    folder = f"probe/{uuid.uuid4().hex}"
    names = ["plain", "replaced", *(f"race-{number}" for number in range(ROUNDS))]
    try:
        _check_plain(store, f"{folder}/plain")
        conditional_create = all(_race(store, f"{folder}/race-{number}", create) for number in range(ROUNDS))
        return Conditions(conditional_create, _check_replace(store, f"{folder}/replaced", replace))
    finally:
        for name in names:
            store.delete(f"{folder}/{name}")


def _check_plain(store: ObjectStore, key: str) -> None:
    content = uuid.uuid4().bytes
    store.put(key, content)
    if store.get(key) != content:
        raise StoreError(f"{store.url}: {key} reads back other than it was written; this store cannot be trusted")
    info = store.head(key)
    if info is None or info.size_bytes != len(content):
        raise StoreError(f"{store.url}: {key} was written, and a look-up shows {info}; this store cannot be trusted")
    if [listed.key for listed in store.list(key)] != [key]:
        raise StoreError(f"{store.url}: {key} was written, and a listing does not show it; see what lies between")
    store.delete(key)
    if store.head(key) is not None:
        raise StoreError(f"{store.url}: {key} was deleted, and is still there; see whether the bucket allows deletes")


def _race(store: ObjectStore, key: str, create: Create) -> bool:
    """Whether exactly one of the racers won, and what it wrote is what lies there."""
    start = Barrier(RACERS)

    def racer(number: int) -> bool:
        start.wait()
        return create(key, f"racer {number}".encode())

    with ThreadPoolExecutor(RACERS, thread_name_prefix="farm-probe") as pool:
        won = list(pool.map(racer, range(RACERS)))
    return won.count(True) == 1 and store.get(key) == f"racer {won.index(True)}".encode()


def _check_replace(store: ObjectStore, key: str, replace: Replace) -> bool:
    store.put(key, b"first")
    info = store.head(key)
    if info is None:
        return False
    return replace(key, b"second", info.etag) and not replace(key, b"third", info.etag) and store.get(key) == b"second"
