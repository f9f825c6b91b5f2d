"""Copies of weights from a bucket: whole or not there, made once, taken up where they were ended."""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from farm import mirror as mirroring
from farm.errors import StoreError, StoreFullError, StoreUnavailableError
from farm.mirror import mirror, revision_of, weights_in
from farm.storage.base import ObjectInfo
from farm.storage.local import LocalStore

FILES = {
    "model_index.json": b"{}",
    "transformer/a.safetensors": b"a" * 1000,
    "transformer/b.safetensors": b"b" * 700,
    "tokenizer/merges.txt": b"x y",
}
UNWANTED = {
    "transformer/old.bin": b"pickle",
    "pipeline.py": b"import os",
    ".cache/lock.json": b"{}",
    "README.md": b"#",
}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class Bucket(LocalStore):
    """A folder with S3's etags, whose reads are counted, and fail where `trouble` says so."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.reads: list[str] = []
        self.trouble: dict[str, Exception] = {}
        self.broken: dict[str, list[bytes]] = {}

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix, after=after):
            digest = hashlib.md5(self.get(info.key), usedforsecurity=False).hexdigest()
            yield ObjectInfo(info.key, info.size_bytes, digest, info.modified_at)

    def read(self, key: str, start: int, size: int, *, etag: str) -> bytes:
        self.reads.append(key)
        if key in self.trouble:
            raise self.trouble[key]
        if self.broken.get(key):
            return self.broken[key].pop(0)
        return self.get(key)[start : start + size]


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    store = Bucket(tmp_path / "bucket")
    for key, data in (FILES | UNWANTED).items():
        store.put(key, data)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_weights_and_their_settings_are_copied_and_nothing_else(bucket: Bucket, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = mirror(
        bucket, weights_in(bucket), tmp_path / "copies" / "x", report=lambda done, total: told.append((done, total))
    )
    assert contents(folder) == FILES
    total = sum(map(len, FILES.values()))
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["x", "x.lock"]


def test_what_is_here_is_not_read_again(bucket: Bucket, tmp_path: Path) -> None:
    objects = weights_in(bucket)
    mirror(bucket, objects, tmp_path / "x")
    bucket.reads.clear()
    assert mirror(bucket, objects, tmp_path / "x") == tmp_path / "x"
    assert bucket.reads == []


def test_patterns_leave_files_out(bucket: Bucket) -> None:
    found = weights_in(bucket, left_out=("transformer/*.safetensors",))
    assert [info.key for info in found] == ["model_index.json", "tokenizer/merges.txt"]


def test_code_comes_where_it_is_named(bucket: Bucket) -> None:
    bucket.put("vae/other.py", b"")
    bucket.put("pipeline.py.bin", b"")
    found = weights_in(bucket, code=("pipeline.py",))
    assert [info.key for info in found] == ["model_index.json", "pipeline.py", *sorted(FILES)[1:]]


def test_a_large_file_comes_in_parts_and_in_order(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring, "PART_BYTES", 64)
    data = bytes(range(256)) * 9
    bucket.put("large.safetensors", data)
    folder = mirror(bucket, weights_in(bucket), tmp_path / "x")
    assert (folder / "large.safetensors").read_bytes() == data
    assert bucket.reads.count("large.safetensors") == 36


def test_a_copy_that_was_ended_is_no_copy_and_goes_on_with_the_files_it_lacks(bucket: Bucket, tmp_path: Path) -> None:
    objects = weights_in(bucket)
    bucket.trouble["transformer/b.safetensors"] = StoreUnavailableError("the store is away")
    with pytest.raises(StoreUnavailableError, match="the store is away"):
        mirror(bucket, objects, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    bucket.trouble.clear()
    bucket.reads.clear()
    mirror(bucket, objects, tmp_path / "x")
    assert set(bucket.reads) == {"transformer/b.safetensors"}
    assert contents(tmp_path / "x") == FILES


def test_many_who_ask_at_once_copy_once(bucket: Bucket, tmp_path: Path) -> None:
    objects, start = weights_in(bucket), threading.Barrier(4)

    def ask(_: int) -> Path:
        start.wait()
        return mirror(bucket, objects, tmp_path / "x")

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {tmp_path / "x"}
    assert sorted(bucket.reads) == sorted(FILES)


def test_a_disk_too_small_is_refused_with_the_bytes_needed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10_000, 9_000, 1_000))
    with pytest.raises(StoreFullError) as caught:
        mirror(bucket, weights_in(bucket), tmp_path / "x")
    assert caught.value.message == (
        f"{tmp_path / 'x.part'}: the weights need 1705 bytes more and that disk has 1000 free; make room there, or name "
        "another folder in FARM_WEIGHTS"
    )
    assert bucket.reads == []


def test_a_disk_that_fills_up_meanwhile_is_said_too(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    objects = weights_in(bucket)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFullError, match="the weights need 1703 bytes more"):
        mirror(bucket, objects, tmp_path / "x")


def test_a_file_that_comes_over_broken_is_read_again(bucket: Bucket, tmp_path: Path) -> None:
    bucket.broken["tokenizer/merges.txt"] = [b"x z"]
    folder = mirror(bucket, weights_in(bucket), tmp_path / "x")
    assert (folder / "tokenizer" / "merges.txt").read_bytes() == b"x y"
    assert bucket.reads.count("tokenizer/merges.txt") == 2


def test_a_file_that_comes_over_broken_twice_is_an_error(bucket: Bucket, tmp_path: Path) -> None:
    bucket.broken["tokenizer/merges.txt"] = [b"x z", b"y z"]
    with pytest.raises(StoreError, match=r"tokenizer/merges\.txt came over broken twice; see to the network"):
        mirror(bucket, weights_in(bucket), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_etag_that_is_no_md5_of_the_content_is_believed_where_two_copies_agree(
    bucket: Bucket, tmp_path: Path
) -> None:
    objects = [ObjectInfo(info.key, info.size_bytes, "0" * 32) for info in weights_in(bucket)]
    assert contents(mirror(bucket, objects, tmp_path / "x")) == FILES


def test_a_key_that_leads_out_of_the_folder_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has the part '\.\.'"):
        mirror(bucket, [ObjectInfo("../evil.json", 2, "e")], tmp_path / "copies" / "x")
    assert not (tmp_path / "copies" / "evil.json").exists()


def test_the_revision_follows_names_sizes_and_etags() -> None:
    one = ObjectInfo("a.json", 2, "e")
    others = [ObjectInfo("b.json", 2, "e"), ObjectInfo("a.json", 3, "e"), ObjectInfo("a.json", 2, "f")]
    revisions = {revision_of([info]) for info in (one, *others)}
    assert len(revisions) == 4
    assert all(revision.startswith("sha256:") for revision in revisions)
    assert revision_of([one, others[0]]) == revision_of([others[0], one])
