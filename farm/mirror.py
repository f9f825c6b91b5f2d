"""Copy weights from below a prefix of a store to this machine: once, however many processes ask for them at a time.

A copy appears whole or not at all: files are written beside it, checked, and the folder renamed. What a killed copy had
finished of it is taken up by the next. Only files of weights and their settings are copied, never pickles, and code where it
is named. Knows nothing of model cards.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from farm.errors import StoreError, StoreFullError
from farm.storage.base import ObjectInfo, ObjectStore
from farm.storage.keys import check_key

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".gguf", ".json", ".txt", ".jinja", ".model")
"""What is weights, or tells how to read them."""
PART_BYTES = 16 * 2**20
PARTS_AT_ONCE = 6
_MD5 = re.compile(r"[0-9a-f]{32}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Report = Callable[[int, int], None]
"""Called with the bytes that are here and those that there are."""


def weights_in(
    store: ObjectStore, *, left_out: Collection[str] = (), code: Collection[str] = ()
) -> tuple[ObjectInfo, ...]:
    """Return the objects of a store that are worth copying, in key order.

    `left_out`: patterns of keys; `code`: keys of what is no weights and is wanted. Raises StoreError.
    """
    return tuple(
        info
        for info in store.list("")
        if info.key in code or (is_wanted(info.key) and not any(fnmatch(info.key, pattern) for pattern in left_out))
    )


def is_wanted(name: str) -> bool:
    """Whether a file is weights or their settings, by its name; what lies under names with a dot is not."""
    path = PurePosixPath(name)
    return path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def revision_of(objects: Sequence[ObjectInfo]) -> str:
    """Return the digest that these objects' names, sizes and etags come to."""
    digest = hashlib.sha256()
    for info in sorted(objects, key=lambda info: info.key):
        digest.update(f"{info.key}\0{info.size_bytes}\0{info.etag}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def mirror(store: ObjectStore, objects: Sequence[ObjectInfo], folder: Path, *, report: Report | None = None) -> Path:
    """Return `folder` with a copy of the objects in it, made now where it is not there; waits while another makes it.

    Raises StoreFullError with the bytes needed, StoreError, OSError.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not folder.is_dir():
            _copy(store, objects, folder, report or (lambda done, total: None))
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process fetches these weights, waiting for it", extra={"folder": str(folder)})
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _copy(store: ObjectStore, objects: Sequence[ObjectInfo], folder: Path, report: Report) -> None:
    half = folder.with_name(f"{folder.name}.part")
    half.mkdir(exist_ok=True)
    files = {info.key: half / check_key(info.key) for info in objects}
    missing = [info for info in objects if not _is_whole(files[info.key], info)]
    total = sum(info.size_bytes for info in objects)
    needed = sum(info.size_bytes for info in missing)
    done = total - needed
    refuse_full(half, needed)
    report(done, total)
    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="farm-weights") as pool:
            for info in missing:
                for written in _fetch(store, info, files[info.key], pool):
                    done += written
                    report(done, total)
    except OSError as exc:
        if exc.errno in _FULL:
            raise _full(half, total - done) from exc
        raise
    for folder_of in sorted({file.parent for file in files.values()}, reverse=True):
        _sync(folder_of)
    os.replace(half, folder)
    _sync(folder.parent)


def refuse_full(folder: Path, needed: int) -> None:
    """Raise StoreFullError where the disk of `folder` has not so many bytes free."""
    if shutil.disk_usage(folder).free < needed:
        raise _full(folder, needed)


def _full(folder: Path, needed: int) -> StoreFullError:
    free = shutil.disk_usage(folder).free
    return StoreFullError(
        f"{folder}: the weights need {needed} bytes more and that disk has {free} free; make room there, or name another "
        "folder in FARM_WEIGHTS"
    )


def _is_whole(file: Path, info: ObjectInfo) -> bool:
    return file.is_file() and file.stat().st_size == info.size_bytes


def _fetch(store: ObjectStore, info: ObjectInfo, file: Path, pool: ThreadPoolExecutor) -> Iterator[int]:
    """Copy one object, yielding the bytes as they are written; the file appears under its name once it is whole.

    An etag that looks like an MD5 is held against the content. Some stores that encrypt give another digest: two copies
    that agree with each other are believed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.half")
    digests: list[str] = []
    while len(digests) < 2:
        digest = hashlib.md5(usedforsecurity=False)
        with half.open("wb") as written:
            for data in _parts(store, info, pool):
                written.write(data)
                digest.update(data)
                if not digests:
                    yield len(data)
            written.flush()
            os.fsync(written.fileno())
        digests.append(digest.hexdigest())
        if not _MD5.fullmatch(info.etag) or info.etag == digests[-1]:
            break
    else:
        if digests[0] != digests[1]:
            half.unlink()
            raise StoreError(f"{store.url}/{info.key} came over broken twice; see to the network, then do it again")
    os.replace(half, file)


def _parts(store: ObjectStore, info: ObjectInfo, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield an object's bytes in order, some parts being read ahead."""
    starts = iter(range(0, info.size_bytes, PART_BYTES))
    ahead: deque[Future[bytes]] = deque()

    def read(start: int) -> bytes:
        return store.read(info.key, start, min(PART_BYTES, info.size_bytes - start), etag=info.etag)

    try:
        while True:
            while len(ahead) < PARTS_AT_ONCE and (start := next(starts, None)) is not None:
                ahead.append(pool.submit(read, start))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        for part in ahead:
            part.cancel()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
