"""What `FARM_STORE` may say."""

import subprocess
import sys
from pathlib import Path

import pytest

from farm.errors import SettingsError
from farm.settings import Settings
from farm.storage.local import LocalStore
from farm.storage.opening import open_store


def test_a_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url, path in (
        ("./farm-data", "farm-data"),
        ("~/data", "data"),
        (f"file://{tmp_path}/x", "x"),
        (str(tmp_path / "y"), "y"),
    ):
        store = open_store(url, Settings())
        assert isinstance(store, LocalStore)
        assert store.url == str(tmp_path / path)


def test_a_bucket_is_opened_without_a_connection() -> None:
    store = open_store("s3://bucket-1/some/prefix/", Settings(s3_endpoint="http://127.0.0.1:1"))
    assert store.url == "s3://bucket-1/some/prefix"
    assert open_store("s3://bucket-1", Settings()).url == "s3://bucket-1"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "names no folder"),
        ("s3://", "is no bucket's name"),
        ("s3:/bucket", "two slashes come after the colon"),
        ("s3:///prefix", "is no bucket's name"),
        ("s3://Bucket_A/x", "is no bucket's name"),
        ("s3://bucket/a//b", "the prefix is not one"),
        ("s3://bucket/../b", "the prefix is not one"),
        ("gs://bucket", "there is no store of the kind 'gs'"),
        ("http://host/bucket", "there is no store of the kind 'http'"),
        ("file://relative", "file:// takes three slashes"),
        ("nul\0", "has a NUL character"),
    ],
)
def test_what_names_no_store_is_refused(url: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        open_store(url, Settings())
    assert reason in caught.value.message
    assert "s3://bucket/prefix" in caught.value.message


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "ftp://host", "http://", "http://host:port", "http://host/path"]
)
def test_endpoints_are_whole_urls(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"FARM_S3_ENDPOINT is .*; write http://host:port"):
        open_store("s3://bucket", Settings(s3_endpoint=endpoint))
    with pytest.raises(SettingsError, match=r"FARM_S3_PUBLIC_ENDPOINT is "):
        open_store("s3://bucket", Settings(s3_public_endpoint=endpoint))


def test_a_folder_needs_no_boto3(tmp_path: Path) -> None:
    code = (
        "import sys; from farm.settings import Settings; from farm.storage.opening import open_store; "
        f"open_store({str(tmp_path)!r}, Settings()); sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
