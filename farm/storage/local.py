"""A folder that behaves like a bucket.

Every object is one file of the same name. Files appear whole or not at all: they are written and synced under `.tmp/`
in the store's own folder, then renamed (put) or hard-linked (create) into place. Invariant: nothing outside `.tmp/` is
ever open for writing.

An etag is made of the file's mtime in nanoseconds, size and inode. Each write sets the mtime itself, later than the
version before it, and lies beside that version until it takes its place, so two versions never share an etag as long as
the file system keeps nanoseconds. `modified_at` is the file's ctime, which the file system sets and no writer can.
"""

import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from threading import Lock

from farm.errors import ObjectMissingError, StoreDeniedError, StoreError, StoreFullError, StoreUnavailableError
from farm.storage.base import Leftovers, ObjectInfo, StoreReport
from farm.storage.keys import TEMPORARY, check_key, check_prefix
from farm.storage.probing import probe_store

STALE_TEMPORARY_S = 3600.0
DELETED_TOGETHER = 1000
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_threads = Lock()


class LocalStore:
    """Objects as files below `folder`, which is made by the first write.

    A folder that was there and then is not, or is another one (an unmounted disk), is an error and never made anew.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.root = Path(os.path.abspath(folder))
        self.url = str(self.root)
        self._identity: tuple[int, int] | None = None

    def __reduce__(self) -> tuple[type["LocalStore"], tuple[str]]:
        return type(self), (self.url,)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with self._translated(path):
            try:
                data = path.read_bytes()
            except _ABSENT:
                self._root_exists()
                raise ObjectMissingError(f"{path} is not there; see whether the job or the file was removed") from None
        self._root_exists()
        return data

    def read(self, key: str, start: int, size: int, *, etag: str) -> bytes:
        path = self._path(key)
        with self._translated(path):
            try:
                with path.open("rb") as file:
                    same = _etag(os.fstat(file.fileno())) == etag
                    file.seek(start)
                    data = file.read(size) if same else b""
            except _ABSENT:
                self._root_exists()
                raise ObjectMissingError(f"{path} is not there; see whether the job or the file was removed") from None
        if len(data) < size:
            raise StoreError(f"{path} has changed since it was looked at; do it again")
        return data

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with self._translated(path):
            self._root_exists()
            return self._info(key, path)

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        path = self._path(key)
        with self._translated(path), self._written(data) as temporary:
            if os.path.lexists(path):
                with self._locked():
                    self._stamp(temporary, after=path)
                    self._into_place(os.replace, temporary, path)
            else:
                self._into_place(os.replace, temporary, path)

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> bool:
        path = self._path(key)
        with self._translated(path):
            self._root_exists()
            if self._info(key, path) is not None:
                return False
            with self._written(data) as temporary:
                try:
                    self._into_place(os.link, temporary, path)
                except FileExistsError:
                    if path.is_dir():
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
                    # A network file system may have carried out a link whose answer was lost, and sent it again.
                    return os.stat(temporary).st_nlink > 1
                except OSError as exc:
                    if exc.errno not in _NO_HARD_LINKS:
                        raise
                    return self._create_without_links(temporary, path)
                return True

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        path = self._path(key)
        with self._translated(path):
            self._root_exists()
            if self._info(key, path) is None:
                return False
            with self._written(data) as temporary, self._locked():
                info = self._info(key, path)
                if info is None or info.etag != etag:
                    return False
                self._stamp(temporary, after=path)
                self._into_place(os.replace, temporary, path)
                return True

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._translated(path):
            if not self._root_exists() or self._info(key, path) is None:
                return
            with self._locked(), suppress(*_ABSENT):
                path.unlink()
            folder = path.parent
            with suppress(OSError):
                while folder != self.root:
                    folder.rmdir()
                    folder = folder.parent

    def delete_many(self, keys: Iterable[str]) -> None:
        paths = (self._path(key) for key in keys)
        while some := list(islice(paths, DELETED_TOGETHER)):
            with self._translated(self.root):
                if not self._root_exists():
                    return
                refused = None
                with self._locked():
                    for path in some:
                        try:
                            path.unlink()
                        except _ABSENT:
                            continue
                        except OSError as exc:
                            refused = refused or exc
                for folder in dict.fromkeys(path.parent for path in some):
                    with suppress(OSError):
                        while folder != self.root and _remove_empty(folder):
                            folder = folder.parent
                if refused is not None:
                    raise refused

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._translated(self.root):
            if not self._root_exists():
                return
        head, _, _ = prefix.rpartition("/")
        yield from self._walk(f"{head}/" if head else "", prefix, after)

    def folders(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        if prefix and not prefix.endswith("/"):
            raise StoreError(f"folders of {prefix!r}: a prefix of folders ends in '/'")
        with self._translated(self.root):
            if not self._root_exists():
                return
        for name in self._names(prefix):
            if name.endswith("/") and next(self._walk(prefix + name, prefix + name, ""), None) is not None:
                yield name[:-1]

    def presign(self, key: str, expires_s: int) -> str | None:
        check_key(key)
        return None

    def sweep(self, before: float, *, remove: bool = True) -> Leftovers:
        with self._translated(self.root):
            return self._swept(lambda status: status.st_ctime < before, remove) if self._root_exists() else Leftovers()

    def free_bytes(self) -> int | None:
        with self._translated(self.root):
            folder = next(one for one in (self.root, *self.root.parents) if one.is_dir())
            disk = os.statvfs(folder)
        return disk.f_bavail * disk.f_frsize

    def probe(self) -> StoreReport:
        with self._translated(self.root):
            self._make_root()
            horizon = time.time() - STALE_TEMPORARY_S
            self._swept(lambda status: status.st_mtime < horizon)
        found = probe_store(self, self.create, self.replace)
        return StoreReport(self.url, found.create, found.replace, self.free_bytes())

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _info(self, key: str, path: Path) -> ObjectInfo | None:
        try:
            status = path.stat()
        except _ABSENT:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return ObjectInfo(key, status.st_size, _etag(status), status.st_ctime)

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
        """Objects below `folder` ("" or ending in '/') in key order; holds the names of one folder at a time."""
        for name in self._names(folder):
            key = folder + name
            if name.endswith("/"):
                could_match = key.startswith(prefix) or prefix.startswith(key)
                if could_match and (key > after or after.startswith(key)):
                    yield from self._walk(key, prefix, after)
            elif key.startswith(prefix) and key > after:
                with self._translated(self.root / key):
                    info = self._info(key, self.root / key)
                if info is not None:
                    yield info

    def _names(self, folder: str) -> Sequence[str]:
        """Names in `folder`, those of folders with a '/' at the end, so that sorting them sorts the keys.

        Order by code point is order by UTF-8 bytes. Names that are not UTF-8 are none of ours.
        """
        path = self.root / folder
        names = []
        with self._translated(path):
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        if _is_utf8(entry.name) and (folder or entry.name != TEMPORARY):
                            names.append(entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name)
            except _ABSENT:
                self._root_exists()
        names.sort()
        return names

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A synced file under `.tmp/` that holds `data`; gone at the end unless it was renamed away."""
        self._make_root()
        temporary = self.root / TEMPORARY / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with temporary.open("xb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                os.utime(file.fileno(), ns=(now := time.time_ns(), now))
                os.fsync(file.fileno())
            yield temporary
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()

    def _stamp(self, temporary: Path, *, after: Path) -> None:
        with suppress(FileNotFoundError):
            now = max(time.time_ns(), after.stat().st_mtime_ns + 1)
            os.utime(temporary, ns=(now, now))

    def _into_place(self, move: Callable[[Path, Path], object], temporary: Path, path: Path) -> None:
        """Rename or link `temporary` to `path`, making its folders; another's delete may take them away again."""
        for _ in range(100):
            try:
                move(temporary, path)
                break
            except FileNotFoundError:
                self._make_root()
                self._make_folders(path.parent)
        else:
            raise StoreUnavailableError(f"{path.parent} is removed as fast as it is made; see who deletes there")
        with suppress(FileNotFoundError):
            _sync_folder(path.parent)

    def _create_without_links(self, temporary: Path, path: Path) -> bool:
        with self._locked():
            if os.path.lexists(path):
                return False
            self._into_place(os.replace, temporary, path)
            return True

    def _make_folders(self, folder: Path) -> None:
        missing = []
        while folder != self.root and not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            try:
                folder.mkdir()
            except FileExistsError:
                if not folder.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
            except FileNotFoundError:
                return
            with suppress(FileNotFoundError):
                _sync_folder(folder.parent)

    def _make_root(self) -> None:
        if not self._root_exists():
            self.root.mkdir(parents=True, exist_ok=True)
            _sync_folder(self.root.parent)
            self._root_exists()
        (self.root / TEMPORARY).mkdir(exist_ok=True)

    def _root_exists(self) -> bool:
        """Whether the store's folder is there; raises where it was and is not, or is another, or is no folder."""
        known = self._identity  # before the look: another thread may be making the folder just now
        try:
            status = self.root.stat()
        except FileNotFoundError:
            if known is not None:
                raise StoreUnavailableError(
                    f"the store's folder {self.root} has vanished; bring it back (a disk unmounted?) and go on"
                ) from None
            return False
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.root))
        identity = (status.st_dev, status.st_ino)
        if known not in (None, identity):
            raise StoreUnavailableError(
                f"the store's folder {self.root} is not the one that it was; bring that back (a disk unmounted?), "
                "or start again if the change was meant"
            )
        self._identity = identity
        return True

    def _swept(self, is_old: Callable[[os.stat_result], bool], remove: bool = True) -> Leftovers:
        """Remove what processes that died left half-written; younger files may be another's work in hand."""
        count = size_bytes = 0
        with suppress(FileNotFoundError), os.scandir(self.root / TEMPORARY) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name != "lock" and is_old(status):
                        if remove:
                            os.unlink(entry.path)
                        count, size_bytes = count + 1, size_bytes + status.st_size
        return Leftovers(count, size_bytes)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change of existing objects at a time, over all threads and processes that share the folder."""
        self._make_root()
        with _threads, (self.root / TEMPORARY / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _translated(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise _store_error(exc, path) from exc


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"


def _store_error(exc: OSError, path: Path) -> StoreError:
    where = exc.filename if isinstance(exc.filename, str) else str(path)
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    if exc.errno in _FULL:
        return StoreFullError(f"{path}: {reason}; make room on that disk, then do it again: a job goes on")
    if exc.errno in _DENIED:
        return StoreDeniedError(f"{where}: {reason}; give this user the right, or choose another folder in FARM_STORE")
    if exc.errno in (errno.ENOTDIR, errno.EEXIST):
        return StoreError(
            f"{_file_in_the_way(path)} is a file where a folder is needed; move it away, "
            "or choose another folder in FARM_STORE"
        )
    if exc.errno == errno.EISDIR:
        return StoreError(
            f"{path} is a folder where a file is needed; move it away, or choose another folder in FARM_STORE"
        )
    if exc.errno == errno.ENAMETOOLONG:
        return StoreError(f"{path}: the name is too long for this file system; choose a folder nearer to the root")
    return StoreUnavailableError(f"{where}: {reason}; see to that disk, then do it again: a job goes on")


def _file_in_the_way(path: Path) -> Path:
    for folder in reversed(path.parents):
        if folder.exists() and not folder.is_dir():
            return folder
    return path


def _remove_empty(folder: Path) -> bool:
    """Remove a folder that holds nothing but such folders; False as soon as a file shows."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.is_dir(follow_symlinks=False) and _remove_empty(Path(entry.path))):
                return False
    folder.rmdir()
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
