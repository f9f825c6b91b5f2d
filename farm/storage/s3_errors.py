"""What botocore raises -> the farm's own store errors, with the bucket, the server and the next step.

The one place that maps them. Servers disagree on codes, so a code decides first and the HTTP status after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from farm.errors import (
    BucketMissingError,
    ObjectMissingError,
    StoreDeniedError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)

BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, HTTPError)

_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
    ProfileNotFound,
)
_UNKNOWN_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "StorageFull", "XMinioStorageFull", "ServiceQuotaExceededException"}
_LATER = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestTimeoutException", "InternalError"}


class Translation:
    """`with translation(key):` around calls of boto3; `url`, `bucket` and `endpoint` go into the messages."""

    def __init__(self, url: str, bucket: str, endpoint: str | None):
        self._url = url
        self._bucket = bucket
        self._server = endpoint or "AWS"

    @contextmanager
    def __call__(self, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except ClientError as exc:
            raise self._answered(exc, key) from exc
        except (BotoCoreError, ResponseParserError, HTTPError) as exc:
            raise self._unanswered(exc, key) from exc

    def bucket_missing(self) -> BucketMissingError:
        return BucketMissingError(
            f"{self._url}: bucket {self._bucket!r} is not at {self._server}; make it, "
            "or mend FARM_STORE or FARM_S3_ENDPOINT"
        )

    def _answered(self, exc: ClientError, key: str) -> StoreError:
        code, status = error_code(exc), http_status(exc)
        reason = exc.response.get("Error", {}).get("Message") or f"HTTP {status}"
        what = (
            f"{self._url}: {exc.operation_name} of {key or self._bucket!r} at {self._server} answered {code} ({reason})"
        )
        if code == "NoSuchBucket":
            return self.bucket_missing()
        if code == "NoSuchKey":
            return ObjectMissingError(f"{what}; see whether the object was removed")
        if code in _FULL or status == 507:
            return StoreFullError(f"{what}; make room or raise the quota, then do it again: a job goes on")
        if code in _LATER or status in (429,) or status >= 500:
            return StoreUnavailableError(f"{what}; wait, then do it again: a job goes on")
        if code == "RequestTimeTooSkewed":
            return StoreDeniedError(f"{what}; set this machine's clock")
        if code in _REGION or status == 301:
            return StoreDeniedError(f"{what}; set FARM_S3_REGION to the bucket's region")
        if code in _UNKNOWN_KEY or status == 401:
            return StoreDeniedError(f"{what}; mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the AWS profile")
        if code == "AccessDenied" or status == 403:
            return StoreDeniedError(
                f"{what}; see the credentials, and give them GetObject, PutObject, DeleteObject and ListBucket "
                "on the bucket"
            )
        return StoreError(f"{what}; see FARM_STORE, FARM_S3_ENDPOINT and FARM_S3_ADDRESSING")

    def _unanswered(self, exc: Exception, key: str) -> StoreError:
        what = f"{self._url}: {key or self._bucket!r} at {self._server}: {exc}".rstrip(".")
        if isinstance(exc, _CREDENTIALS):
            return StoreDeniedError(f"{what}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
        if isinstance(exc, SSLError):
            return StoreUnavailableError(f"{what}; mend the certificate, or name its authority in AWS_CA_BUNDLE")
        if isinstance(exc, ResponseParserError):
            return StoreUnavailableError(f"{what}; what answers there does not speak S3, see FARM_S3_ENDPOINT")
        if isinstance(exc, (ConnectionError, HTTPClientError, HTTPError, IncompleteReadError)):
            return StoreUnavailableError(f"{what}; see that the server runs and FARM_S3_ENDPOINT is right, then go on")
        return StoreError(f"{what}; see FARM_STORE and the FARM_S3_* settings")


def is_passing(code: str) -> bool:
    """Whether asking again may well be answered otherwise."""
    return code in _LATER or code == "ServiceUnavailable"


def error_code(exc: ClientError) -> str:
    """S3's own code; of an answer to a HEAD, which has no body, the HTTP status."""
    return str(exc.response.get("Error", {}).get("Code", ""))


def http_status(exc: ClientError) -> int:
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def was_retried(exc: ClientError) -> bool:
    """Whether boto3 had sent this request before: an earlier sending may have been carried out."""
    return int(exc.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0
