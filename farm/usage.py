"""Count the bytes and objects of a store by job and kind, from listings alone. Memory is flat."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from farm.prefetch import in_order
from farm.removal import Removed, is_run
from farm.storage.base import ObjectStore

THREADS = 8
KINDS = {
    "images": "pictures",
    "thumbnails": "thumbnails",
    "receipts": "receipts",
    "dataset": "dataset",
    "prompts": "prompts",
}
OTHER = "other"
_LAST = "\U0010ffff"  # no key that begins with a folder's name comes after the folder's name and this


@dataclass(slots=True)
class Usage:
    """What lies below one job's name, or with an empty name elsewhere in the store."""

    job: str
    kinds: dict[str, Removed] = field(default_factory=dict)

    @property
    def total(self) -> Removed:
        """The sum over all kinds."""
        return sum(self.kinds.values(), Removed())

    def add(self, kind: str, found: Removed) -> None:
        """Count something of a kind."""
        if found.objects:
            self.kinds[kind] = self.kinds.get(kind, Removed()) + found


def job_usages(store: ObjectStore) -> Iterator[Usage]:
    """Yield how much each job has, one by one, those too that have no plan."""
    for job in store.folders("jobs/"):
        yield job_usage(store, job)


def job_usage(store: ObjectStore, job: str) -> Usage:
    """Count what one job has; pictures are listed a thousand at a time by several threads."""
    usage = Usage(job)
    for kind, found in in_order(lambda one: (one[0], _measure(store, one[1])), _folders(store, job), threads=THREADS):
        usage.add(kind, found)
    return usage


def other_usage(store: ObjectStore) -> Usage:
    """Count what is no job's: marks, measured speeds, and what others put there."""
    usage = Usage("")
    for name in store.folders(""):
        if name != "jobs":
            usage.add(name, _measure(store, f"{name}/"))
    usage.add(OTHER, _directly_below(store, ""))
    return usage


def _folders(store: ObjectStore, job: str) -> Iterator[tuple[str, str]]:
    """Yield kind and prefix of each part of a job. A prefix without a slash at its end is that one folder's own objects."""
    yield OTHER, f"jobs/{job}"
    for name in store.folders(f"jobs/{job}/"):
        folder = f"jobs/{job}/{name}"
        if not is_run(name):
            yield OTHER, f"{folder}/"
            continue
        yield OTHER, folder
        for part in store.folders(f"{folder}/"):
            kind = KINDS.get(part, OTHER)
            if part in ("images", "thumbnails"):
                for block in store.folders(f"{folder}/{part}/"):
                    yield kind, f"{folder}/{part}/{block}/"
            else:
                yield kind, f"{folder}/{part}/"


def _measure(store: ObjectStore, prefix: str) -> Removed:
    return Removed.of(store.list(prefix)) if prefix.endswith("/") else _directly_below(store, f"{prefix}/")


def _directly_below(store: ObjectStore, prefix: str) -> Removed:
    """Count the objects of a folder, not those of the folders in it, each of which costs one short listing."""
    found, after = Removed(), ""
    while True:
        for info in store.list(prefix, after=after):
            name, in_folder, _ = info.key.removeprefix(prefix).partition("/")
            if in_folder:
                after = f"{prefix}{name}/{_LAST}"
                break
            found += Removed(1, info.size_bytes)
        else:
            return found
