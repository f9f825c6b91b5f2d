"""Keys of the endpoint: who holds one, what it may do, until when.

A key is `farm-<id>-<secret>`. The store keeps a record a key, `keys/<id>.json`, with the SHA-256 of the secret: who reads
the store cannot use a key, and what was shown once is shown never again. The secret has 256 random bits, so a plain hash is
enough. A revoked key stays on record, so that its images and jobs keep a name behind them.
"""

import hashlib
import hmac
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from farm.errors import ObjectMissingError, RecordError, RequestError, UnauthorizedError
from farm.portion import Allowance
from farm.records import Record
from farm.storage.base import ObjectStore

Scope = Literal["read", "render", "admin"]
"""What a key may: look; also render and change what its owner's is; also change everybody's, and the farm. Each has the ones
before it in itself."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

PREFIX = "farm-"
KEYS_PREFIX = "keys/"
CACHE_S = 5.0
"""For how long a gateway may go on with what it read of a key: so late a revocation is felt at most."""
CACHED = 10_000
"""Ids that are remembered, known or not, so that guesses fill no memory."""
MAX_OWNER = 100
_TEXT = re.compile(r"farm-([0-9a-f]{12})-([0-9a-f]{64})")
_ID = re.compile(r"[0-9a-f]{12}")
_REPLACE_TRIES = 5


class Key(Record):
    """What the store knows of a key. Moments are ISO 8601, UTC."""

    id: str = Field(pattern=r"^([0-9a-f]{12})?$", description="names the key in lists, logs and quotas; no secret")
    owner: str = Field(min_length=1, max_length=MAX_OWNER, description="whose jobs and images are made with it")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    allowance: Allowance = Allowance()
    note: str = Field(default="", max_length=200, description="what it is for")
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None
    secret_sha256: str = Field(pattern=r"^([0-9a-f]{64})?$", repr=False)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        limits = (self.allowance.images_per_minute, self.allowance.images_at_once, self.allowance.images_per_day)
        if any(limit is not None and limit < 1 for limit in limits):
            raise ValueError("a limit must be 1 or more; leave it out where there is none")
        for at in (self.created_at, self.expires_at, self.revoked_at):
            if at is not None and datetime.fromisoformat(at).tzinfo is None:
                raise ValueError(f"moment {at} has no offset from UTC")
        return self

    def may(self, scope: Scope) -> bool:
        """Whether the key's scopes, or one that has it in itself, allow this."""
        return max(SCOPES.index(given) for given in self.scopes) >= SCOPES.index(scope)

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        """How the key stands at a moment."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and datetime.fromisoformat(self.expires_at) <= now:
            return "expired"
        return "valid"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. `text` is all of it, and nowhere else."""

    key: Key
    text: str


def keyless(owner: str) -> Key:
    """Return who is let in without a key, on this machine alone: an administrator under `owner`'s name."""
    never = "1970-01-01T00:00:00+00:00"
    return Key(id="", owner=owner, scopes=("admin",), created_at=never, secret_sha256="")


def create_key(
    store: ObjectStore,
    *,
    owner: str,
    scopes: Sequence[Scope],
    at: datetime,
    allowance: Allowance | None = None,
    expires_at: datetime | None = None,
    note: str = "",
    draw: Callable[[int], str] = secrets.token_hex,
) -> NewKey:
    """Make a key and store its record. `draw` gives so many random bytes, as hex.

    Raises RequestError for values that cannot be.
    """
    if expires_at is not None and expires_at <= at:
        raise RequestError(f"the key would have expired at {expires_at.isoformat()} already; choose a later moment")
    secret = draw(32)
    while True:
        try:
            key = Key(
                id=draw(6),
                owner=owner,
                scopes=tuple(scope for scope in SCOPES if scope in scopes),
                allowance=allowance or Allowance(),
                note=note,
                created_at=at.isoformat(timespec="seconds"),
                expires_at=expires_at.isoformat(timespec="seconds") if expires_at else None,
                secret_sha256=_digest(secret),
            )
        except ValidationError as exc:
            first = exc.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "key"
            raise RequestError(f"{where}: {first['msg']}, got {first['input']!r}"[:300]) from exc
        if store.create(_key_of(key.id), _bytes(key), content_type="application/json"):
            return NewKey(key, f"{PREFIX}{key.id}-{secret}")


def list_keys(store: ObjectStore) -> Iterator[Key]:
    """Yield every key's record, in the order of ids."""
    for found in store.list(KEYS_PREFIX):
        key_id = found.key.removeprefix(KEYS_PREFIX).removesuffix(".json")
        key = _read(store, key_id) if _ID.fullmatch(key_id) else None
        if key is not None:
            yield key


def revoke_key(store: ObjectStore, key_id: str, *, at: datetime) -> Key:
    """Let a key in no more, everywhere within CACHE_S; a key that is revoked already stays so.

    Raises RequestError where there is no such key.
    """
    if not _ID.fullmatch(key_id):
        raise RequestError(f"{_shown(key_id)} is no key's id; farm keys list shows them")
    for _ in range(_REPLACE_TRIES):
        found = store.head(_key_of(key_id))
        key = _read(store, key_id) if found is not None else None
        if found is None or key is None:
            raise RequestError(f"no key has the id {key_id}; farm keys list shows them")
        if key.revoked_at is not None:
            return key
        revoked = key.model_copy(update={"revoked_at": at.isoformat(timespec="seconds")})
        if store.replace(_key_of(key_id), _bytes(revoked), found.etag):
            return revoked
    raise RecordError(f"{_key_of(key_id)} changed again and again while it was revoked; try again")


class Keys:
    """The keys of a store as a gateway checks them: each record read at most every CACHE_S. Safe from several threads."""

    def __init__(self, store: ObjectStore, *, cache_s: float = CACHE_S):
        self._store = store
        self._cache_s = cache_s
        self._read_at: OrderedDict[str, tuple[float, Key | None]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, text: str, now: datetime) -> Key:
        """Return the key that `text` is. Blocks for the store where `is_fresh` is false.

        Raises UnauthorizedError, and StoreError where its record cannot be read.
        """
        key_id, secret = _parts(text)
        known, key = self._recall(key_id, now)
        if not known:
            key = _read(self._store, key_id)
            self._remember(key_id, key, now)
        return _let_in(key, secret, now)

    def is_fresh(self, text: str, now: datetime) -> bool:
        """Whether `check` would answer from memory."""
        match = _TEXT.fullmatch(text)
        return match is None or self._recall(match[1], now)[0]

    def any(self) -> bool:
        """Whether the store has any key, of whatever state."""
        return next(list_keys(self._store), None) is not None

    def _recall(self, key_id: str, now: datetime) -> tuple[bool, Key | None]:
        with self._lock:
            at, key = self._read_at.get(key_id, (float("-inf"), None))
        # A clock that was set back must not keep what was read for longer.
        return 0 <= now.timestamp() - at < self._cache_s, key

    def _remember(self, key_id: str, key: Key | None, now: datetime) -> None:
        with self._lock:
            self._read_at[key_id] = (now.timestamp(), key)
            self._read_at.move_to_end(key_id)
            while len(self._read_at) > CACHED:
                self._read_at.popitem(last=False)


def _parts(text: str) -> tuple[str, str]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise UnauthorizedError("this is no key of a farm; one is farm-<id>-<secret>, as farm keys create showed it")
    return match[1], match[2]


def _let_in(key: Key | None, secret: str, now: datetime) -> Key:
    """Return the key if its secret is right and it is valid; how it stands is told to none but its holder."""
    stored = key.secret_sha256 if key is not None else _digest("")
    if not hmac.compare_digest(_digest(secret), stored) or key is None:
        raise UnauthorizedError("this key is not known here; ask an administrator for one, or check FARM_KEY")
    state = key.state(now)
    if state != "valid":
        when = key.revoked_at or key.expires_at
        verb = "was revoked" if state == "revoked" else "expired"
        raise UnauthorizedError(f"key {key.id} {verb} at {when}; ask an administrator for a new one")
    return key


def _read(store: ObjectStore, key_id: str) -> Key | None:
    """Raises RecordError where the record is damaged."""
    try:
        data = store.get(_key_of(key_id))
    except ObjectMissingError:
        return None
    try:
        key = Key.model_validate_json(data)
    except ValidationError as exc:
        raise RecordError(f"{_key_of(key_id)} is damaged: {exc.errors()[0]['msg']}; revoke it by deleting it") from exc
    if key.id != key_id or not key.secret_sha256:
        raise RecordError(f"{_key_of(key_id)} is the record of another key; delete it")
    return key


def _key_of(key_id: str) -> str:
    return f"{KEYS_PREFIX}{key_id}.json"


def _bytes(key: Key) -> bytes:
    return key.model_dump_json(exclude_none=True).encode() + b"\n"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _shown(text: str) -> str:
    """A whole key given for an id must not reach a terminal's history or a log again."""
    match = _TEXT.fullmatch(text)
    return f"the whole key of {match[1]}" if match else repr(text[:40])
