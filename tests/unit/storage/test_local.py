"""What is particular to a folder: disks that fill up or vanish, rights, files in the way, what a dead process left."""

import errno
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farm.errors import StoreDeniedError, StoreError, StoreFullError, StoreUnavailableError
from farm.storage.local import STALE_TEMPORARY_S, LocalStore

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "farm-data"


@pytest.fixture
def store(folder: Path) -> LocalStore:
    return LocalStore(folder)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that all may read, while this process has no rights over it."""
    folder = Path(tempfile.mkdtemp(prefix="farm-test-", dir="/tmp"))
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_reading_makes_no_folder(folder: Path, store: LocalStore) -> None:
    assert store.head("k") is None
    assert list(store.list("")) == []
    assert list(store.folders("")) == []
    store.delete("k")
    assert not folder.exists()


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = LocalStore("./farm-data")
    monkeypatch.chdir("/")
    store.put("k", b"x")
    assert (tmp_path / "farm-data" / "k").read_bytes() == b"x"


def test_objects_are_plain_files_and_nothing_else_is_left(folder: Path, store: LocalStore) -> None:
    store.put("a/b.png", b"1")
    store.create("a/c.png", b"2")
    store.create("a/c.png", b"3")
    assert files_below(folder) == ["a/b.png", "a/c.png"]
    store.put("a/b.png", b"4")
    assert files_below(folder) == [".tmp/lock", "a/b.png", "a/c.png"]


def test_probe_reports_room_and_sweeps_only_stale_leftovers(folder: Path, store: LocalStore) -> None:
    store.put("k", b"x")
    old, young = folder / ".tmp" / "1-old", folder / ".tmp" / "2-young"
    for leftover in (old, young):
        leftover.write_bytes(b"half")
    past = time.time() - STALE_TEMPORARY_S - 60
    os.utime(old, (past, past))
    report = store.probe()
    assert report.free_bytes is not None
    assert report.free_bytes > 0
    assert not old.exists()
    assert young.exists()
    assert [info.key for info in store.list("")] == ["k"]


def test_a_file_that_may_not_be_removed_is_said_once_the_others_are_gone(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a/1", "a/2", "b/1"):
        store.put(key, b"x")
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "1" and path.parent.name == "a":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StoreDeniedError, match=r"a/1: Permission denied; give this user the right"):
        store.delete_many(["a/1", "a/2", "b/1"])
    assert files_below(folder) == [".tmp/lock", "a/1"]
    assert not (folder / "b").exists()


def test_a_writers_clock_has_no_part_in_when_an_object_was_written(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("now", b"")
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_000_000_000)
    store.put("long-ago", b"")
    now, then = (store.head(key) for key in ("now", "long-ago"))
    assert now is not None
    assert then is not None
    assert 0 <= then.modified_at - now.modified_at < 60


def test_a_put_changes_the_etag_even_where_the_clock_stands(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    etags = []
    for number in range(20):
        store.put("k", str(number % 10).encode())
        info = store.head("k")
        assert info is not None
        etags.append(info.etag)
    assert len(set(etags)) == 20


def test_readers_see_whole_versions_only(store: LocalStore) -> None:
    versions = [bytes([number]) * 300_000 for number in range(4)]
    store.put("k", versions[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for version in versions:
                store.put("k", version)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        seen = [store.get("k") for _ in range(300)]
        stop.set()
        writing.result()
    assert all(content in versions for content in seen)


def test_writers_and_deleters_of_one_folder_do_not_trip_each_other(store: LocalStore) -> None:
    def churn(number: int) -> None:
        for _ in range(30):
            store.put(f"a/b/{number}", b"x")
            store.delete(f"a/b/{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert list(store.list("")) == []


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for store in (LocalStore(tmp_path / "file"), LocalStore(tmp_path / "file" / "below")):
        for use in (store.probe, lambda store=store: store.put("k", b"")):
            with pytest.raises(StoreError) as caught:
                use()
            assert "is a file where a folder is needed" in caught.value.message
            assert "FARM_STORE" in caught.value.message
    with pytest.raises(StoreError, match="is a file where a folder is needed"):
        list(LocalStore(tmp_path / "file").list(""))


def test_an_object_in_the_way_of_a_folder_is_said(store: LocalStore) -> None:
    store.put("a", b"x")
    for write in (store.put, store.create):
        with pytest.raises(StoreError, match=r"/a is a file where a folder is needed"):
            write("a/b", b"y")
    store.put("c/d", b"x")
    for write in (store.put, store.create):
        with pytest.raises(StoreError, match=r"/c is a folder where a file is needed"):
            write("c", b"y")
    assert store.get("a") == b"x"


def test_a_folder_without_rights_is_said(unprivileged: Path) -> None:
    for store in (LocalStore(unprivileged), LocalStore(unprivileged / "below")):
        for use in (store.probe, lambda store=store: store.create("k", b"")):
            with pytest.raises(StoreDeniedError) as caught:
                use()
            assert str(unprivileged) in caught.value.message
            assert "Permission denied; give this user the right" in caught.value.message


def test_a_folder_that_vanished_is_not_made_anew(folder: Path, store: LocalStore) -> None:
    store.put("k", b"x")
    folder.rename(folder.with_name("elsewhere"))
    for use in (
        lambda: store.put("k2", b""),
        lambda: store.create("k2", b""),
        lambda: store.get("k"),
        lambda: store.head("k"),
        lambda: list(store.list("")),
        store.probe,
    ):
        with pytest.raises(StoreUnavailableError, match=r"farm-data has vanished; bring it back"):
            use()
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(StoreUnavailableError, match=r"farm-data is not the one that it was"):
        store.put("k2", b"")
    folder.rmdir()
    folder.with_name("elsewhere").rename(folder)
    store.put("k2", b"")
    assert store.get("k") == b"x"


def test_a_file_limit_reached_is_a_full_store_and_leaves_nothing(folder: Path, store: LocalStore) -> None:
    store.put("before", b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for write in (store.put, store.create):
            with pytest.raises(StoreFullError, match=r"File too large; make room on that disk"):
                write("large", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_below(folder) == ["before"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_full_store_and_loses_nothing(folder: Path) -> None:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = LocalStore(folder)
        store.put("kept", b"x" * 100_000)
        for write in (store.put, store.create):
            with pytest.raises(StoreFullError, match=r"No space left on device; make room on that disk"):
                write("large", bytes(800_000))
        with pytest.raises(StoreFullError):
            store.put("kept", bytes(800_000))
        assert store.get("kept") == b"x" * 100_000
        assert store.head("large") is None
        assert files_below(folder) == [".tmp/lock", "kept"] or files_below(folder) == ["kept"]
        assert store.create("small", b"fits") is True
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_listing_starts_before_all_is_read(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(20):
        store.put(f"images/{folder:06d}/k", b"")
    opened: list[str] = []
    scandir = os.scandir

    def counting(path: str) -> object:
        opened.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    assert next(store.list("images/")).key == "images/000000/k"
    assert [Path(path).name for path in opened] == ["images", "000000"]
    opened.clear()
    assert next(store.list("images/", after="images/000017/z")).key == "images/000018/k"
    assert [Path(path).name for path in opened] == ["images", "000017", "000018"]


def test_foreign_names_are_passed_over(folder: Path, store: LocalStore) -> None:
    store.put("a/k", b"x")
    (folder / "empty").mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/a/not-utf8-\xff")).write_bytes(b"")
    assert [info.key for info in store.list("")] == ["a/k"]
    assert list(store.folders("")) == ["a"]
