"""A bucket on S3, or on a server that speaks its language, through boto3.

The only file that knows boto3; what it raises becomes a `StoreError` in `s3_errors.py`. Conditional puts are sent only
after a look, so that a server which ignores the condition behaves as one that has none, and no worse.
"""

import io
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_tz
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.client import Config
from botocore.exceptions import ClientError

from farm.errors import BucketMissingError, ObjectMissingError, StoreError, StoreUnavailableError
from farm.storage.base import Leftovers, ObjectInfo, StoreReport
from farm.storage.keys import check_key, check_prefix
from farm.storage.probing import probe_store
from farm.storage.s3_errors import BROKEN_OFF, Translation, error_code, http_status, is_passing, was_retried

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

Addressing = Literal["auto", "path", "virtual"]

MULTIPART_BYTES = 16 * 1024 * 1024
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
BROKEN_OFF_S = 60.0  # a body that broke off is asked for again while the call is not older than this
CONFLICT_TRIES = 8
LOST_RACE_TRIES = 3  # Ceph's gateway answers 500 to those who lose a race of If-Match; asked again, 412
DELETED_TOGETHER = 1000  # as many as one DeleteObjects takes
DELETE_THREADS = 8  # where the server has no DeleteObjects
WRITER = "farm-writer"
OCTETS = "application/octet-stream"


class S3Store:
    """Objects below `prefix` in `bucket`. Safe with threads; a pickled or forked copy makes a client of its own.

    `attempts`: how often boto3 sends one request before the server counts as unavailable; with its pauses that takes
    about two minutes where the server is silent, and seconds where nobody listens. Only a body that breaks off in the
    middle of `get` is asked for again on top of that, as often at most, and not once a minute has passed.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        public_endpoint: str | None = None,
        region: str = "us-east-1",
        addressing: Addressing = "auto",
        attempts: int = 5,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.bucket = bucket
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._root = f"{prefix}/" if prefix else ""
        self._endpoint = endpoint
        self._public_endpoint = public_endpoint or endpoint
        self._region = region
        self._addressing = addressing
        self._attempts = attempts
        self._clock = clock
        self._translated = Translation(self.url, bucket, endpoint)
        self._conditions = True
        self._quoted = True
        self._bucket_seen = False
        self._deletes_many = True
        self._forget_clients()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_clients")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_clients()

    def get(self, key: str) -> bytes:
        return self._body(key, {}, lambda answer: None)

    def read(self, key: str, start: int, size: int, *, etag: str) -> bytes:
        def check(answer: "GetObjectOutputTypeDef") -> None:
            """Compared here, since servers differ in how they take If-Match; and some know of no Range."""
            if _bare(answer["ETag"]) != etag:
                raise StoreError(f"{self.url}/{key} has changed since it was looked at; do it again")
            if answer["ContentLength"] != size:
                raise StoreError(
                    f"{self.url}/{key}: {size} bytes were asked for and {answer['ContentLength']} answered; use a server "
                    "that can read parts of objects"
                )

        return self._body(key, {"Range": f"bytes={start}-{start + size - 1}"}, check) if size else b""

    def _body(self, key: str, options: dict[str, Any], check: "Callable[[GetObjectOutputTypeDef], None]") -> bytes:
        no_more = self._clock() + BROKEN_OFF_S
        for attempt in range(self._attempts):
            with self._translated(key):
                try:
                    answer = self._client().get_object(Bucket=self.bucket, Key=self._key(key), **options)
                except ClientError as exc:
                    if error_code(exc) in ("NoSuchKey", "404"):
                        raise ObjectMissingError(
                            f"{self.url}/{key} is not there; see whether the job or the object was removed"
                        ) from None
                    raise
                try:
                    check(answer)
                    data: bytes = answer["Body"].read()
                    return data
                except StoreError:
                    answer["Body"].close()
                    raise
                except BROKEN_OFF:
                    if attempt == self._attempts - 1 or self._clock() > no_more:
                        raise
            _wait(attempt)
        raise StoreUnavailableError(
            f"{self.url}/{key} broke off {self._attempts} times; see to the server or the network"
        )

    def head(self, key: str) -> ObjectInfo | None:
        with self._translated(key):
            try:
                answer = self._client().head_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as exc:
                if http_status(exc) != 404:
                    raise
                self._check_bucket()
                return None
        return ObjectInfo(
            key, answer["ContentLength"], _bare(answer["ETag"]), modified_at=answer["LastModified"].timestamp()
        )

    def put(self, key: str, data: bytes, *, content_type: str = OCTETS) -> None:
        name = self._key(key)
        with self._translated(key):
            if len(data) <= MULTIPART_BYTES:
                self._client().put_object(Bucket=self.bucket, Key=name, Body=data, ContentType=content_type)
            else:
                self._client().upload_fileobj(
                    io.BytesIO(data),
                    self.bucket,
                    name,
                    ExtraArgs={"ContentType": content_type},
                    Config=TransferConfig(
                        multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, max_concurrency=4
                    ),
                )

    def create(self, key: str, data: bytes, *, content_type: str = OCTETS) -> bool:
        return self.head(key) is None and self._create(key, data, content_type)

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        info = self.head(key)
        return info is not None and info.etag == etag and self._replace(key, data, etag)

    def delete(self, key: str) -> None:
        with self._translated(key):
            try:
                self._client().delete_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as exc:
                if error_code(exc) not in ("NoSuchKey", "404"):
                    raise

    def delete_many(self, keys: Iterable[str]) -> None:
        names = ((key, self._key(key)) for key in keys)
        while some := dict(islice(names, DELETED_TOGETHER)):
            if not (self._deletes_many and self._delete_together(some)):
                with ThreadPoolExecutor(DELETE_THREADS, thread_name_prefix="farm-delete") as pool:
                    for _ in pool.map(self.delete, some):
                        pass

    def _delete_together(self, names: dict[str, str]) -> bool:
        """Send one DeleteObjects; False where the server has no such thing, or not for these keys.

        What it answers for single keys counts as if each had been asked for alone.
        """
        keys = {name: key for key, name in names.items()}
        left = list(keys)
        for attempt in range(self._attempts):
            with self._translated(keys[left[0]]):
                try:
                    answer = self._client().delete_objects(
                        Bucket=self.bucket, Delete={"Objects": [{"Key": name} for name in left], "Quiet": True}
                    )
                except ClientError as exc:
                    if error_code(exc) == "MalformedXML":  # a key that XML cannot carry
                        return False
                    if http_status(exc) in (405, 501) or error_code(exc) == "MissingContentMD5":
                        self._deletes_many = False
                        return False
                    raise
            refused = [one for one in answer.get("Errors", ()) if one.get("Code") not in ("NoSuchKey", "404")]
            if not refused:
                break
            left = [one["Key"] for one in refused]
            if attempt == self._attempts - 1 or not all(is_passing(one.get("Code", "")) for one in refused):
                with self._translated(keys.get(left[0], left[0])):
                    raise ClientError({"Error": refused[0]}, "DeleteObjects")
            _wait(attempt)
        return True

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        for page in self._pages(prefix, {"StartAfter": self._root + after} if after else {}):
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(self._root)
                if not key.endswith("/") and key > after:
                    yield ObjectInfo(key, entry["Size"], _bare(entry["ETag"]), entry["LastModified"].timestamp())

    def folders(self, prefix: str) -> Iterator[str]:
        for page in self._pages(prefix, {"Delimiter": "/"}):
            for entry in page.get("CommonPrefixes", ()):
                name = entry["Prefix"].removeprefix(self._root + prefix).rstrip("/")
                if name:
                    yield name

    def presign(self, key: str, expires_s: int) -> str | None:
        with self._translated(key):
            url: str = self._client(public=True).generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket, "Key": self._key(key)}, ExpiresIn=expires_s
            )
        return url

    def sweep(self, before: float, *, remove: bool = True) -> Leftovers:
        found = Leftovers()
        uploads = self._paged("list_multipart_uploads", {"Prefix": self._root})
        for upload in (upload for page in uploads for upload in page.get("Uploads", ())):
            if upload["Initiated"].timestamp() >= before:
                continue
            name: dict[str, Any] = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
            with self._translated(upload["Key"]):
                try:
                    pages = self._client().get_paginator("list_parts").paginate(Bucket=self.bucket, **name)
                    size_bytes = sum(part["Size"] for page in pages for part in page.get("Parts", ()))
                    if remove:
                        self._client().abort_multipart_upload(Bucket=self.bucket, **name)
                except ClientError as exc:
                    if error_code(exc) != "NoSuchUpload":  # it has ended meanwhile
                        raise
                    continue
            found = Leftovers(found.count + 1, found.size_bytes + size_bytes)
        return found

    def free_bytes(self) -> int | None:
        return None

    def probe(self) -> StoreReport:
        with self._translated(""):
            try:
                self._client().head_bucket(Bucket=self.bucket)
            except ClientError as exc:
                if http_status(exc) == 404:
                    raise self._bucket_missing() from exc
                # Rights may well be given for objects alone; what follows tells, with better messages than a HEAD has.
                if http_status(exc) not in (400, 401, 403):
                    raise
        found = probe_store(self, self._create, self._replace)
        self._conditions = self._conditions and found.create
        return StoreReport(self.url, found.create, found.replace, None)

    def _create(self, key: str, data: bytes, content_type: str = OCTETS) -> bool:
        return self._put_if({"IfNoneMatch": "*"}, key, data, content_type)

    def _replace(self, key: str, data: bytes, etag: str) -> bool:
        """Put if the etag matches. RFC 9110 wants it in quotes; Ceph's gateway only takes it without them."""
        forms = [f'"{etag}"', etag] if self._quoted else [etag, f'"{etag}"']
        if self._put_if({"IfMatch": forms[0]}, key, data):
            return True
        info = self.head(key)
        if info is None or info.etag != etag or not self._put_if({"IfMatch": forms[1]}, key, data):
            return False
        self._quoted = not self._quoted
        return True

    def _put_if(self, condition: dict[str, Any], key: str, data: bytes, content_type: str = OCTETS) -> bool:
        """Put under `condition`; without it where the server has none, since callers have looked just before.

        The writer's mark tells its own write, met again by a retry, from another's.
        """
        mark = uuid.uuid4().hex
        for attempt in range(CONFLICT_TRIES):
            with self._translated(key):
                try:
                    self._client().put_object(
                        Bucket=self.bucket,
                        Key=self._key(key),
                        Body=data,
                        ContentType=content_type,
                        Metadata={WRITER: mark},
                        **(condition if self._conditions else {}),
                    )
                    return True
                except ClientError as exc:
                    if http_status(exc) == 412:
                        return (attempt > 0 or was_retried(exc)) and self._is_mine(key, data, mark)
                    if error_code(exc) == "NoSuchKey":
                        return False
                    if http_status(exc) == 501 and self._conditions:
                        self._conditions = False
                    elif not (http_status(exc) == 409 or (http_status(exc) == 500 and attempt < LOST_RACE_TRIES)):
                        raise
            _wait(attempt)
        raise StoreUnavailableError(
            f"{self.url}/{key}: {CONFLICT_TRIES} puts in a row met another's (409); "
            "wait, then start again: the job goes on"
        )

    def _is_mine(self, key: str, data: bytes, mark: str) -> bool:
        try:
            answer = self._client().head_object(Bucket=self.bucket, Key=self._key(key))
        except ClientError as exc:
            if http_status(exc) == 404:
                return False
            raise
        marks = {name.lower(): value for name, value in answer["Metadata"].items()}
        return marks[WRITER] == mark if WRITER in marks else self.get(key) == data

    def _pages(self, prefix: str, options: dict[str, Any]) -> Iterator[Any]:
        check_prefix(prefix)
        return self._paged("list_objects_v2", {"Prefix": self._root + prefix, **options})

    def _paged(self, operation: Any, options: dict[str, Any]) -> Iterator[Any]:
        about = options.get("Key") or options.get("Prefix") or ""
        with self._translated(about):
            pages = iter(self._client().get_paginator(operation).paginate(Bucket=self.bucket, **options))
        while True:
            with self._translated(about):
                page = next(pages, None)
            if page is None:
                return
            yield page

    def _check_bucket(self) -> None:
        """A HEAD that finds no object has no body to say whether there is a bucket: ask once."""
        if self._bucket_seen:
            return
        try:
            self._client().head_bucket(Bucket=self.bucket)
        except ClientError as exc:
            if http_status(exc) == 404:
                raise self._bucket_missing() from exc
        self._bucket_seen = True

    def _bucket_missing(self) -> BucketMissingError:
        return self._translated.bucket_missing()

    def _key(self, key: str) -> str:
        return check_key(self._root + key) if check_key(key) and self._root else key

    def _forget_clients(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[tuple[int, bool], S3Client] = {}

    def _client(self, *, public: bool = False) -> "S3Client":
        name = (os.getpid(), public)
        with self._lock:
            if name not in self._clients:
                self._clients[name] = self._new_client(self._public_endpoint if public else self._endpoint)
            return self._clients[name]

    def _new_client(self, endpoint: str | None) -> "S3Client":
        addressing = self._addressing
        if endpoint is None and addressing == "auto" and "." not in self.bucket:
            # By itself boto3 signs links for AWS's global host, which redirects young buckets of other regions.
            addressing = "virtual"
        client: S3Client = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint,
            region_name=self._region,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": addressing},
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": self._attempts},
                max_pool_connections=32,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        client.meta.events.register("before-parse.s3", _fail_broken_heads)
        return client


def _fail_broken_heads(response_dict: dict[str, Any], operation_model: Any, **_: Any) -> None:
    """Let an answer that broke off within its head count as a 500, which boto3 asks for again.

    To Python's HTTP the end of a connection ends a head as well as an empty line does: such an answer would be believed,
    with no body, or with the half of a header.
    """
    headers, status = response_dict["headers"], response_dict["status_code"]
    if status in (204, 304) or "transfer-encoding" in headers:
        return
    whole = headers.get("content-length", "").isdigit()
    if operation_model.name == "HeadObject" and status == 200:
        etag = headers.get("etag", "")
        dated = parsedate_tz(headers.get("last-modified", "")) is not None
        whole = whole and dated and bool(etag) and etag.startswith('"') == etag.endswith('"')
    if not whole:
        response_dict["status_code"], response_dict["body"] = 500, b""


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _wait(attempt: int) -> None:
    time.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.05 * 2**attempt))
