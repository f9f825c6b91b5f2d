"""The contract of stores over real S3 servers, and what only a server can do: refuse, fail, die."""

import os
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from farm.errors import (
    BucketMissingError,
    ObjectMissingError,
    StoreDeniedError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from farm.settings import Settings
from farm.storage.base import ObjectStore
from farm.storage.opening import open_store
from farm.storage.s3 import S3Store
from tests.integration.servers import MotoProcess, S3Server, ceph
from tests.store_contract import StoreContract


class BucketContract(StoreContract):
    def leave_unfinished(self, store: ObjectStore) -> None:
        assert isinstance(store, S3Store)
        name = {"Bucket": store.bucket, "Key": store._key("half")}
        upload = store._client().create_multipart_upload(**name)
        store._client().upload_part(**name, UploadId=upload["UploadId"], PartNumber=1, Body=b"half")


class TestCeph(BucketContract):
    @pytest.fixture
    def store(self, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
        return s3_server.store(monkeypatch)


class TestMoto(BucketContract):
    dates_uploads = False

    @pytest.fixture
    def store(self, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
        return moto_server.store(monkeypatch)


class TestServerThatIgnoresConditions(BucketContract):
    conditional = False
    dates_uploads = False

    @pytest.fixture
    def store(self, ignoring_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
        return ignoring_server.store(monkeypatch)


def test_wrong_keys_are_denied(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "NOBODY"), ("AWS_SECRET_ACCESS_KEY", "wrong")):
        store = s3_server.store(monkeypatch)
        monkeypatch.setenv(name, value)
        for use in (
            store.probe,
            lambda store=store: store.put("k", b""),
            lambda store=store: store.create("k", b""),
            lambda store=store: store.head("k"),
            lambda store=store: store.get("k"),
            lambda store=store: list(store.list("")),
        ):
            with pytest.raises(StoreDeniedError) as caught:
                use()
            assert s3_server.endpoint in caught.value.message
            assert "AWS_ACCESS_KEY_ID" in caught.value.message or "see the credentials" in caught.value.message


def test_no_keys_at_all_are_denied(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = moto_server.store(monkeypatch)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for use in (store.probe, lambda: store.put("k", b""), lambda: store.presign("k", 60)):
        with pytest.raises(StoreDeniedError, match=r"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
            use()


@pytest.mark.parametrize("server", ["s3_server", "moto_server"])
def test_a_missing_bucket_is_said(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    s3: S3Server = request.getfixturevalue(server)
    store = s3.store(monkeypatch, bucket="no-such-bucket")
    for use in (
        store.probe,
        lambda: store.put("k", b""),
        lambda: store.put("k", bytes(17 * 1024 * 1024)),
        lambda: store.create("k", b""),
        lambda: store.replace("k", b"", "etag"),
        lambda: store.head("k"),
        lambda: store.get("k"),
        lambda: list(store.list("")),
        lambda: list(store.folders("")),
    ):
        with pytest.raises(BucketMissingError) as caught:
            use()
        assert caught.value.message == (
            f"{store.url}: bucket 'no-such-bucket' is not at {s3.endpoint}; make it, "
            "or mend FARM_STORE or FARM_S3_ENDPOINT"
        )


def test_no_server_is_unavailable(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        store = S3Server(endpoint, "farm", "any", "any").store(monkeypatch, attempts=2)
        for use in (store.probe, lambda: store.put("k", b""), lambda: store.get("k"), lambda: list(store.list(""))):
            with pytest.raises(StoreUnavailableError) as caught:
                use()
            assert endpoint in caught.value.message
            assert "see that the server runs and FARM_S3_ENDPOINT is right" in caught.value.message


def test_a_server_killed_midway_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = MotoProcess(tmp_path / "log")
    store = moto.server.store(monkeypatch, attempts=2)
    written = []
    halfway = threading.Event()

    def write_on() -> None:
        for number in range(100_000):
            store.put(f"k/{number}", bytes(100_000))
            written.append(number)
            if number == 20:
                halfway.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_on)
        halfway.wait(60)
        moto.kill()
        with pytest.raises(StoreUnavailableError, match=r"see that the server runs"):
            writing.result()
    assert len(written) > 20
    with pytest.raises(StoreUnavailableError):
        list(store.list("k/"))


def test_ceph_keeps_what_it_acknowledged_through_kill_9(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3_server.folder is not None
    store = s3_server.store(monkeypatch)
    for number in range(50):
        assert store.create(f"k/{number:03d}", str(number).encode())
    ceph("kill", s3_server.folder)
    impatient = s3_server.store(monkeypatch, attempts=1)
    with pytest.raises(StoreUnavailableError):
        impatient.put("k", b"")
    ceph("start", s3_server.folder)
    assert [info.key for info in store.list("k/")] == [f"k/{number:03d}" for number in range(50)]
    assert all(store.get(f"k/{number:03d}") == str(number).encode() for number in range(50))
    assert store.create("k/000", b"other") is False


def test_presigned_links_read_without_keys_and_cannot_be_bent(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3_server.store(monkeypatch)
    store.put("bild ü.png", b"picture", content_type="image/png")
    url = store.presign("bild ü.png", 60)
    assert url is not None
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == b"picture"
        assert answer.headers["Content-Type"] == "image/png"
    store.put("other", b"secret")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url.replace("bild%20%C3%BC.png", "other"), timeout=10)


def test_presigned_links_name_the_public_endpoint(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = s3_server.store(monkeypatch)
    store.put("k", b"picture")
    public = s3_server.endpoint.replace("127.0.0.1", "localhost")
    settings = Settings(s3_endpoint=s3_server.endpoint, s3_public_endpoint=public, s3_addressing="path")
    url = open_store(store.url, settings).presign("k", 60)
    assert url is not None
    assert url.startswith(public)
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.read() == b"picture"


def test_a_write_whose_answer_was_lost_counts_as_ones_own(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stores the object and then answers 500; the client's retry meets its own write as 412."""
    with AnswersLost(moto_server.endpoint) as front:
        store = S3Server(front.endpoint, "farm", "any", "any").store(monkeypatch)
        assert store.create("k", b"mine") is True
        assert store.get("k") == b"mine"
        assert front.lost == 1
        info = store.head("k")
        assert info is not None
        front.lost = 0
        assert store.replace("k", b"mine, again", info.etag) is True
        assert front.lost == 1
        assert store.create("k", b"mine, again") is False


@pytest.mark.parametrize(
    ("status", "code", "error", "advice"),
    [
        (403, "QuotaExceeded", StoreFullError, "make room or raise the quota, then do it again: a job goes on"),
        (507, "XMinioStorageFull", StoreFullError, "make room or raise the quota, then do it again: a job goes on"),
        (503, "SlowDown", StoreUnavailableError, "wait, then do it again: a job goes on"),
        (500, "InternalError", StoreUnavailableError, "wait, then do it again: a job goes on"),
        (403, "AccessDenied", StoreDeniedError, "give them GetObject, PutObject"),
        (403, "RequestTimeTooSkewed", StoreDeniedError, "set this machine's clock"),
        (403, "SignatureDoesNotMatch", StoreDeniedError, "mend AWS_ACCESS_KEY_ID"),
        (400, "AuthorizationHeaderMalformed", StoreDeniedError, "set FARM_S3_REGION"),
        (404, "NoSuchBucket", BucketMissingError, "make it, or mend FARM_STORE"),
    ],
)
def test_what_servers_answer_becomes_the_farms_errors(
    status: int, code: str, error: type[Exception], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode()
    with Refusing(status, body) as server:
        store = S3Server(server.endpoint, "farm", "any", "any").store(monkeypatch, attempts=1)
        for use in (lambda: store.put("k", b"x"), lambda: store.put("k", bytes(17 * 1024 * 1024)), store.get):
            with pytest.raises(error) as caught:
                use("k") if use == store.get else use()
            assert advice in str(caught.value)
            assert server.endpoint in str(caught.value)


@pytest.mark.parametrize(
    ("code", "error", "advice"),
    [
        ("AccessDenied", StoreDeniedError, "give them GetObject, PutObject, DeleteObject"),
        ("InternalError", StoreUnavailableError, "wait, then do it again: a job goes on"),
    ],
)
def test_a_key_that_may_not_be_deleted_is_named(
    code: str, error: type[Exception], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Refusing(200, b"") as server:
        store = S3Server(server.endpoint, "farm", "any", "any").store(monkeypatch, attempts=2)
        prefix = store.url.removeprefix("s3://farm/")
        server.content = (
            f"<DeleteResult><Error><Key>{prefix}/jobs/b</Key><Code>{code}</Code><Message>because</Message></Error>"
            "</DeleteResult>".encode()
        )
        with pytest.raises(error, match=rf"DeleteObjects of 'jobs/b' at .* answered {code} \(because\); .*{advice}"):
            store.delete_many(["jobs/a", "jobs/b"])


def test_a_server_that_deletes_one_at_a_time_is_asked_so(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AnswersLost(moto_server.endpoint) as front:  # which answers 501 to a POST
        store = S3Server(front.endpoint, "farm", "any", "any").store(monkeypatch)
        for number in range(20):
            store.put(f"k/{number}", b"")
        store.delete_many(f"k/{number}" for number in range(19))
        assert store._deletes_many is False
        assert [info.key for info in store.list("")] == ["k/19"]


def test_what_does_not_speak_s3_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    with Refusing(200, b"<html>welcome</html>") as server:
        store = S3Server(server.endpoint, "farm", "any", "any").store(monkeypatch, attempts=1)
        with pytest.raises(StoreError, match=r"reads back other than it was written; this store cannot be trusted"):
            store.probe()


def test_a_server_without_conditions_falls_back_to_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    with Refusing(501, b"<Error><Code>NotImplemented</Code></Error>", only_conditional=True) as server:
        store = S3Server(server.endpoint, "farm", "any", "any").store(monkeypatch)
        assert store.create("k", b"x") is True
        assert server.puts == [True, False]
        assert store.create("k2", b"x") is True
        assert server.puts == [True, False, False]


def test_one_store_serves_many_threads_and_a_fork(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = moto_server.store(monkeypatch)
    store.put("k", b"x")
    clients = {id(store._client()) for _ in range(3)}
    assert len(clients) == 1
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert id(store._client()) not in clients
    assert store.get("k") == b"x"


def test_objects_outside_the_prefix_are_not_seen(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = moto_server.store(monkeypatch)
    prefix = store.url.rpartition("/")[2]
    client = boto3.client("s3", endpoint_url=moto_server.endpoint, region_name="us-east-1")
    for key in (f"{prefix}2/x", f"{prefix}/inside", f"{prefix}/console-folder/"):
        client.put_object(Bucket="farm", Key=key, Body=b"")
    client.close()
    assert [info.key for info in store.list("")] == ["inside"]
    assert store.get("inside") == b""
    with pytest.raises(ObjectMissingError, match=rf"{prefix}/x is not there"):
        store.get("x")


class Loopback:
    """An HTTP server on a loopback port, for the length of a `with`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Loopback":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_expect_100(self) -> bool:
        return True

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.close_connection = True


class AnswersLost(Loopback):
    """Passes requests on, and turns the answer to the first conditional put into a 500."""

    lost = 0

    def __init__(self, endpoint: str):
        front = self

        class Passing(Quiet):
            def pass_on(self) -> None:
                headers = {
                    name: value for name, value in self.headers.items() if name.lower() not in ("host", "expect")
                }
                request = urllib.request.Request(
                    endpoint + self.path, self.body() or None, headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=10) as answer:
                        status, content, got = answer.status, answer.read(), answer.headers
                except urllib.error.HTTPError as exc:
                    with exc:
                        status, content, got = exc.code, exc.read(), exc.headers
                conditional = "If-None-Match" in self.headers or "If-Match" in self.headers
                if self.command == "PUT" and conditional and not front.lost:
                    front.lost += 1
                    status, content, got = 500, b"", {}
                self.send_response(status)
                for name, value in got.items():
                    if name.lower() not in ("connection", "content-length", "date", "server", "transfer-encoding"):
                        self.send_header(name, value)
                size = got.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", size)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_DELETE = pass_on  # noqa: N815

        super().__init__(Passing)


class Refusing(Loopback):
    """Answers everything, or conditional puts alone, with one status and body; `puts` says which were conditional."""

    def __init__(self, status: int, content: bytes, *, only_conditional: bool = False):
        self.puts: list[bool] = []
        self.content = content
        puts, refusing = self.puts, self

        class Answering(Quiet):
            def refuse(self) -> None:
                self.body()
                conditional = "If-None-Match" in self.headers
                if self.command == "PUT":
                    puts.append(conditional)
                if conditional or not only_conditional:
                    self.answer(status, refusing.content)
                elif self.command == "HEAD" and self.path.strip("/").count("/"):
                    self.answer(404, b"")
                else:
                    self.answer(200, b"")

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = refuse  # noqa: N815

        super().__init__(Answering)
