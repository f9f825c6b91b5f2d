"""The contract of stores over folders: as they are, without hard links, and without conditional puts."""

import errno
import os
from pathlib import Path

import pytest

from farm.storage.base import ObjectStore, StoreReport
from farm.storage.local import LocalStore
from farm.storage.probing import probe_store
from tests.store_contract import StoreContract


class Unconditional(LocalStore):
    """A store that ignores the condition on a put, after the look that the contract asks for."""

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> bool:
        return self.head(key) is None and self._ignoring(key, data)

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        info = self.head(key)
        return info is not None and info.etag == etag and self._ignoring(key, data)

    def probe(self) -> StoreReport:
        found = probe_store(self, self._ignoring, lambda key, data, etag: self._ignoring(key, data))
        return StoreReport(self.url, found.create, found.replace, None)

    def _ignoring(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class FolderContract(StoreContract):
    def leave_unfinished(self, store: ObjectStore) -> None:
        assert isinstance(store, LocalStore)
        (store.root / ".tmp" / "1-dead").write_bytes(b"half")


class TestLocalStore(FolderContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "farm-data")


class TestLocalStoreWithoutHardLinks(FolderContract):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
        def no_link(*args: object) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "link", no_link)
        return LocalStore(tmp_path / "farm-data")


class TestStoreWithoutConditionalPuts(FolderContract):
    conditional = False

    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return Unconditional(tmp_path / "farm-data")
