"""Whether a call is made again: one rule for both clients. Pure; time and chance are arguments.

A call that may have been carried out is repeated only where repeating changes nothing. What a farm refuses for now (429,
503) it has not carried out, and says when asking again may help; longer than the caller's patience nobody waits.
"""

import json
import ssl
from typing import Any

import httpx2

from farm.client.address import Address
from farm.errors import (
    BusyError,
    FarmError,
    FarmUnavailableError,
    ForbiddenError,
    LaterError,
    LimitedError,
    RequestError,
    StoreUnavailableError,
    UnauthorizedError,
    error_of,
)

FIRST_S = 0.25
LONGEST_S = 8.0
UNREACHED_S = 2.0
"""How long a farm is tried that nobody listens for: enough for one that is just being started."""

_REFUSED = frozenset({429, 503})
_PASSING = frozenset({502, 504})
_PASSES = (LaterError, FarmUnavailableError, StoreUnavailableError)
_BY_STATUS: dict[int, type[FarmError]] = {
    400: RequestError,
    401: UnauthorizedError,
    403: ForbiddenError,
    404: RequestError,
    405: RequestError,
    409: RequestError,
    413: RequestError,
    415: RequestError,
    422: RequestError,
    429: LimitedError,
    503: BusyError,
}


class Attempts:
    """The tries of one call. `repeatable`: to make it twice changes nothing. `now` is monotonic, seconds."""

    def __init__(self, address: Address, *, repeatable: bool, patience_s: float, now: float):
        self._address = address
        self._repeatable = repeatable
        self._patience_s = patience_s
        self._began = now
        self._tries = 0

    def answered(self, response: httpx2.Response, *, now: float, chance: float) -> float | None:
        """Return None for an answer to take, or the seconds until the next try. Raises what the farm raised."""
        if response.is_success:
            return None
        error = error_of_answer(response, self._address)
        # What ended its renderers is not given to more of them: RendererDiedError is none of these.
        refused = response.status_code in _REFUSED and isinstance(error, _PASSES)
        if refused or (response.status_code in _PASSING and self._repeatable):
            wait = retry_after(response)
            wait = self._pause(chance) if wait is None else wait
            if now + wait - self._began <= self._patience_s:
                self._tries += 1
                return wait
        raise error

    def failed(self, exc: httpx2.TransportError, *, now: float, chance: float) -> float:
        """Return the seconds until the next try of a call that was not answered, or raise FarmUnavailableError."""
        fault = fault_of(exc)
        unreached = isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout)
        patience_s = min(UNREACHED_S, self._patience_s) if unreached else self._patience_s
        wait = self._pause(chance)
        again = (unreached or self._repeatable) and not isinstance(exc, httpx2.ReadTimeout | httpx2.UnsupportedProtocol)
        if fault is not None or not again or now + wait - self._began > patience_s:
            raise unanswered(exc, self._address, may_have_happened=not (unreached or self._repeatable)) from exc
        self._tries += 1
        return wait

    def _pause(self, chance: float) -> float:
        return min(LONGEST_S, FIRST_S * 2.0**self._tries) * (0.5 + 0.5 * chance)


def retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds that an answer asks to wait; None where it does not say, or a proxy names a date."""
    said = response.headers.get("retry-after", "").strip()
    return float(said) if said.isascii() and said.isdigit() and len(said) <= 9 else None


def error_of_answer(response: httpx2.Response, address: Address) -> FarmError:
    """Return what a farm refused a request with as the error that it raised; the answer must have been read."""
    status = response.status_code
    if response.is_redirect:
        to = response.headers.get("location", "elsewhere")[:200]
        return FarmUnavailableError(f"{address.url} sends on to {address.hide(to)}; give the address that it leads to")
    code, message = _said(response.content)
    if message is None:
        kind = _BY_STATUS.get(status, FarmUnavailableError)
        return kind(f"{address.url} answered {status} {response.reason_phrase} and is no farm's endpoint, or is behind a "
                    "proxy whose farm is away; check FARM_URL")  # fmt: skip
    found = error_of(code or "", address.hide(message))
    if found.code != code:
        found = _BY_STATUS.get(status, FarmUnavailableError)(address.hide(message))
    if isinstance(found, LaterError):
        found.retry_after_s = retry_after(response)
    return found


def unanswered(exc: httpx2.TransportError, address: Address, *, may_have_happened: bool) -> FarmUnavailableError:
    """Return the error of a call that the farm did not answer."""
    fault = fault_of(exc)
    if fault is not None:
        return FarmUnavailableError(
            f"the certificate of {address.url} is not trusted: {fault}; name its CA's PEM file in SSL_CERT_FILE"
        )
    said = address.hide(str(exc) or type(exc).__name__)
    if isinstance(exc, httpx2.ProxyError):
        return FarmUnavailableError(
            f"the proxy between here and {address.url} refused ({said}); mend HTTPS_PROXY, or name the farm in NO_PROXY"
        )
    if isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout):
        return FarmUnavailableError(
            f"no farm answers at {address.url} ({said}); is it up (farm up), and is FARM_URL right?"
        )
    if address.url.startswith("http://") and isinstance(exc, httpx2.RemoteProtocolError | httpx2.ReadError):
        said += "; if it speaks TLS, write https://"
    perhaps = "; what was asked may have been done all the same" if may_have_happened else ""
    return FarmUnavailableError(f"{address.url} broke off in the middle of an answer ({said}){perhaps}")


def fault_of(exc: BaseException) -> str | None:
    """Return what is wrong with a certificate where that is why a connection failed."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return seen.verify_message or "it cannot be verified"
        seen = seen.__cause__ or seen.__context__
    return None


def _said(content: bytes) -> tuple[str | None, str | None]:
    """Code and message of an error in the endpoint's shape; None, None for anything else."""
    try:
        found: Any = json.loads(content)
    except ValueError:
        return None, None
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None, None
    code = error.get("code")
    return code if isinstance(code, str) else None, error["message"]
