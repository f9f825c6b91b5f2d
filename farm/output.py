"""From pixels to stored files, off the render thread: encode, hash, flag, upload, with a bound on what waits.

`put` blocks when the pixels that wait reach the bound, so a slow store slows the render and never fills memory. A
store's error stops the writer and is raised in `put` and `finish`; it is never an image's fault. Knows no receipts.
"""

import hashlib
import io
import logging
import re
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import imagehash
import numpy as np
from PIL import Image

from farm.engine import Picture
from farm.errors import CancelledError, StoreError
from farm.manifest import Output
from farm.plan import ImageSpec
from farm.provenance import Provenance, encode_picture, pixels_sha256
from farm.storage.base import ObjectStore

log = logging.getLogger(__name__)

MAX_PENDING_BYTES = 256 * 2**20
THREADS = 4
THUMBNAIL_PX = 256
SLUG_CHARACTERS = 48
BLACK_LEVEL = 3
"""A picture whose brightest channel is at most this, of 255, counts as black."""
WAKE_S = 0.2
"""How often a thread that waits for room looks whether it was cancelled."""

EXTENSIONS = {"png": "png", "webp": "webp", "jpeg": "jpg"}
CONTENT_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


@dataclass(frozen=True, slots=True)
class Names:
    """Where one attempt at a shard puts its objects. Attempt and hash in each name: a late twin changes nothing."""

    job: str
    run: str
    pass_number: int
    attempt: int

    def image(self, spec: ImageSpec, sha256: str, extension: str) -> str:
        """Return the key of an image."""
        return self._key("images", spec, sha256, extension)

    def thumbnail(self, spec: ImageSpec, sha256: str) -> str:
        """Return the key of the thumbnail of the image with that hash."""
        return self._key("thumbnails", spec, sha256, "webp")

    def _key(self, kind: str, spec: ImageSpec, sha256: str, extension: str) -> str:
        slug = slug_of(spec.key) if spec.key is not None else ""
        named = f"{spec.index:09d}_{slug}" if slug else f"{spec.index:09d}"
        return (
            f"jobs/{self.job}/{self.run}/{kind}/{spec.index // 1000:06d}/"
            f"{named}.p{self.pass_number}a{self.attempt}-{sha256[:8]}.{extension}"
        )


def slug_of(key: str) -> str:
    """Return what of a row's key is safe in any file name and URL: ASCII letters, digits, `-` and `_`; may be empty."""
    plain = unicodedata.normalize("NFKD", key).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[^A-Za-z0-9_]+", "-", plain)[:SLUG_CHARACTERS].strip("-")


@dataclass(frozen=True, slots=True)
class Written:
    """One picture's files, stored; or, with `error` set, why it could not become a file."""

    spec: ImageSpec
    seconds: float
    object: str | None = None
    thumbnail: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    phash: str | None = None
    flag: Literal["black", "constant"] | None = None
    error: str | None = None


ProvenanceOf = Callable[[ImageSpec, str], Provenance]
"""Called with an image and the sha256 of its pixels."""


class Writer:
    """Encodes and stores pictures in threads of its own. Use it in a `with` block: leaving by an exception abandons.

    `on_written` is called by those threads after each picture; what it raises is logged.

    `seconds` sums the threads' time, `peak_pending_bytes` is the most that ever waited.
    """

    def __init__(
        self,
        store: ObjectStore,
        output: Output,
        *,
        names: Names,
        provenance: ProvenanceOf,
        threads: int = THREADS,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        cancelled: Callable[[], bool] = lambda: False,
        on_written: Callable[[], None] = lambda: None,
    ):
        self._store = store
        self._output = output
        self._names = names
        self._provenance = provenance
        self._max_pending_bytes = max_pending_bytes
        self._cancelled = cancelled
        self._on_written = on_written
        self._changed = threading.Condition()
        self._waiting: deque[Picture] = deque()
        self._written: list[Written] = []
        self._pending = 0
        self._pending_bytes = 0
        self._error: StoreError | None = None
        self._closed = False
        self.peak_pending_bytes = 0
        self.seconds = 0.0
        self._threads = [threading.Thread(target=self._work, name=f"writer-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()

    def put(self, picture: Picture) -> None:
        """Take a picture; blocks while too much waits. Raises the first StoreError, or CancelledError while it waits.

        One picture larger than the bound is taken when nothing else waits.
        """
        size = picture.pixels.nbytes
        with self._changed:
            self._wait_until(lambda: self._pending == 0 or self._pending_bytes + size <= self._max_pending_bytes)
            self._waiting.append(picture)
            self._pending += 1
            self._pending_bytes += size
            self.peak_pending_bytes = max(self.peak_pending_bytes, self._pending_bytes)
            self._changed.notify_all()

    def finish(self) -> list[Written]:
        """Wait until everything is stored, end the threads, and return what was written, in index order."""
        with self._changed:
            self._wait_until(lambda: self._pending == 0)
        self.abandon()
        return sorted(self._written, key=lambda written: written.spec.index)

    def abandon(self) -> None:
        """Drop what waits and end the threads; each first finishes the picture in its hands. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        while True:
            if self._error is not None:
                raise self._error
            if ready():
                return
            if self._cancelled():
                raise CancelledError("the render was asked to stop while pictures waited for the store")
            self._changed.wait(WAKE_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                picture = self._waiting.popleft()
            written: Written | None = None
            failed: StoreError | None = None
            started = time.perf_counter()
            try:
                written = self._write(picture)
            except StoreError as exc:
                failed = exc
            except Exception as exc:
                log.exception("picture not written", extra={"image": picture.spec.index})
                written = Written(picture.spec, picture.seconds, error=f"{type(exc).__name__}: {exc}")
            with self._changed:
                self.seconds += time.perf_counter() - started
                self._pending -= 1
                self._pending_bytes -= picture.pixels.nbytes
                if written is not None:
                    self._written.append(written)
                if failed is not None and self._error is None:
                    self._error = failed
                    self._closed = True
                    self._waiting.clear()
                self._changed.notify_all()
            if written is not None:
                self._tell()

    def _tell(self) -> None:
        """Call `on_written`; what it raises is its own trouble, the picture is stored."""
        try:
            self._on_written()
        except Exception:
            log.exception("what follows a stored picture failed")

    def _write(self, picture: Picture) -> Written:
        spec, pixels = picture.spec, picture.pixels
        image = Image.fromarray(pixels)
        form = self._output.format
        data = encode_picture(pixels, self._provenance(spec, pixels_sha256(pixels)))
        sha256 = hashlib.sha256(data).hexdigest()
        key = self._names.image(spec, sha256, EXTENSIONS[form])
        self._store.put(key, data, content_type=CONTENT_TYPES[form])
        small = thumbnail(image) if self._output.thumbnails else None
        small_key = None
        if small is not None:
            small_key = self._names.thumbnail(spec, sha256)
            self._store.put(small_key, small, content_type="image/webp")
        return Written(
            spec=spec,
            seconds=picture.seconds,
            object=key,
            thumbnail=small_key,
            size_bytes=len(data),
            sha256=sha256,
            phash=str(imagehash.phash(image)),
            flag=flag_of(pixels),
        )


def flag_of(pixels: np.ndarray) -> Literal["black", "constant"] | None:
    """Say whether a picture is black, or all one colour, which no prompt asks for."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    highest = flat.max(axis=0)
    if int(highest.max()) <= BLACK_LEVEL:
        return "black"
    return "constant" if bool((highest - flat.min(axis=0) <= 1).all()) else None


def thumbnail(image: Image.Image) -> bytes | None:
    """Return a WebP whose longest side is 256 pixels, or None where the picture is no larger than that."""
    if max(image.size) <= THUMBNAIL_PX:
        return None
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()
