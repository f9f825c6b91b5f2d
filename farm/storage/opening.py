"""From what `FARM_STORE` says to a store. boto3 is imported only where the store is a bucket."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from farm.errors import SettingsError, StoreError
from farm.settings import Settings
from farm.storage.base import ObjectStore
from farm.storage.keys import check_key
from farm.storage.local import LocalStore

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_RIGHT = "write a folder (./farm-data), or s3://bucket/prefix"


def open_store(url: str, settings: Settings) -> ObjectStore:
    """Return the store that `url` names; touches neither disk nor network. Raises SettingsError."""
    if url.startswith("s3://"):
        return _open_bucket(url, settings)
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        raise SettingsError(f"store {url!r}: there is no store of the kind {scheme!r}; {_RIGHT}")
    if re.match(r"(s3|file):", url, re.IGNORECASE) and not separator:
        raise SettingsError(f"store {url!r}: two slashes come after the colon; {_RIGHT}")
    path = rest if separator else url
    if not path.strip():
        raise SettingsError(f"store {url!r} names no folder; {_RIGHT}")
    if separator and not path.startswith("/"):
        raise SettingsError(f"store {url!r}: file:// takes three slashes and a whole path; {_RIGHT}")
    if "\0" in path:
        raise SettingsError(f"store {url!r} has a NUL character; {_RIGHT}")
    try:
        return LocalStore(Path(path).expanduser())
    except RuntimeError as exc:
        raise SettingsError(f"store {url!r}: {exc}; {_RIGHT}") from exc


def _open_bucket(url: str, settings: Settings) -> ObjectStore:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise SettingsError(
            f"store {url!r}: {bucket!r} is no bucket's name (3 to 63 of a-z, 0-9, '-' and '.'); write s3://bucket/prefix"
        )
    prefix = prefix.rstrip("/")
    if prefix:
        try:
            check_key(prefix)
        except StoreError as exc:
            raise SettingsError(f"store {url!r}: the prefix is not one: {exc}; {_RIGHT}") from exc
    for name, endpoint in (
        ("FARM_S3_ENDPOINT", settings.s3_endpoint),
        ("FARM_S3_PUBLIC_ENDPOINT", settings.s3_public_endpoint),
    ):
        if endpoint is not None and not _is_endpoint(endpoint):
            raise SettingsError(f"{name} is {endpoint!r}; write http://host:port or https://host, without a path")
    from farm.storage.s3 import S3Store

    return S3Store(
        bucket,
        prefix,
        endpoint=settings.s3_endpoint,
        public_endpoint=settings.s3_public_endpoint,
        region=settings.s3_region,
        addressing=settings.s3_addressing,
    )


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where the port is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.path in ("", "/") and not parts.query
