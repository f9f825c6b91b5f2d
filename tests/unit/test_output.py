"""The writer's threads: what they store, how much may wait, what a failing store does."""

import hashlib
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farm.engine import Picture
from farm.errors import CancelledError, FarmError, StoreFullError
from farm.manifest import Output
from farm.output import Names, Writer, flag_of, slug_of, thumbnail
from farm.plan import ImageSpec
from farm.provenance import Provenance, read_picture
from farm.storage.local import LocalStore
from tests.drawing import numerics, spec

NAMES = Names("job", "0a1b2c3d", 2, 3)


def provenance(image: ImageSpec, pixels_sha256: str) -> Provenance:
    return Provenance(
        index=image.index,
        key=image.key,
        prompt=image.prompt,
        seed=image.seed,
        params=image.params,
        model={"name": "sketch"},
        numerics=numerics(),
        plan="0" * 64,
        format="png",
        quality=None,
        pixels_sha256=pixels_sha256,
    )


def picture(index: int, size: int = 64, **changes: Any) -> Picture:
    pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Picture(spec(index, **changes), pixels, 0.5, nan=False)


class SlowStore(LocalStore):
    """A folder whose puts wait for `gate`; `fail` is raised instead where it is set."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.gate = threading.Event()
        self.fail: Exception | None = None
        self.puts = 0

    def put(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        self.puts += 1
        assert self.gate.wait(30)
        if self.fail is not None:
            raise self.fail
        super().put(key, data, content_type=content_type)


def writer(store: Any, **changes: Any) -> Writer:
    return Writer(store, Output(), names=NAMES, provenance=provenance, **changes)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[FarmError]]:
    raised: list[FarmError] = []

    def run() -> None:
        try:
            work()
        except FarmError as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def writer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("writer-")]


def test_pictures_are_stored_hashed_and_returned_in_index_order(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    seen: list[int] = []
    with writer(store, on_written=lambda: seen.append(1)) as out:
        for index in (1001, 5, 3):
            out.put(picture(index))
        written = out.finish()
    assert [file.spec.index for file in written] == [3, 5, 1001]
    for file in written:
        assert file.object is not None
        data = store.get(file.object)
        assert (file.size_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        read = read_picture(data)
        assert np.array_equal(read.pixels, picture(file.spec.index).pixels)
        assert file.phash is not None
        assert len(file.phash) == 16
        assert (file.flag, file.thumbnail, file.error, file.seconds) == (None, None, None, 0.5)
    assert len(seen) == 3
    assert writer_threads() == []


def test_names_carry_index_key_pass_attempt_and_hash() -> None:
    sha256 = "0123456789abcdef"
    assert NAMES.image(spec(12345), sha256, "png") == "jobs/job/0a1b2c3d/images/000012/000012345.p2a3-01234567.png"
    assert NAMES.thumbnail(spec(5, key="Ein Käfer/../x"), sha256) == (
        "jobs/job/0a1b2c3d/thumbnails/000000/000000005_Ein-Kafer-x.p2a3-01234567.webp"
    )


@pytest.mark.parametrize(
    ("key", "slug"),
    [
        ("plain_1", "plain_1"),
        ("漢字", ""),
        ("../../etc", "etc"),
        ("a" * 500, "a" * 48),
        ("\x00\ud83d\n", ""),
        ("a.b c", "a-b-c"),
    ],
)
def test_slugs_are_safe_in_any_file_name(key: str, slug: str) -> None:
    assert slug_of(key) == slug


def test_a_slow_store_holds_the_render_and_bounds_memory(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    size = picture(0).pixels.nbytes
    with writer(store, max_pending_bytes=3 * size) as out:
        thread, raised = in_thread(lambda: [out.put(picture(i)) for i in range(20)])
        thread.join(0.3)
        assert thread.is_alive()
        assert out.peak_pending_bytes == 3 * size
        store.gate.set()
        thread.join(30)
        assert len(out.finish()) == 20
    assert raised == []
    assert out.peak_pending_bytes == 3 * size


def test_a_picture_larger_than_the_bound_is_taken_alone(tmp_path: Path) -> None:
    with writer(LocalStore(tmp_path), max_pending_bytes=10) as out:
        out.put(picture(0))
        out.put(picture(1))
        assert len(out.finish()) == 2


def test_a_store_error_is_raised_in_put_and_in_finish_and_ends_the_threads(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    store.fail = StoreFullError("the disk is full")
    store.gate.set()

    def render() -> None:
        with writer(store) as out:
            out.put(picture(0))
            with pytest.raises(StoreFullError, match="the disk is full"):
                out.finish()
            out.put(picture(1))

    with pytest.raises(StoreFullError, match="the disk is full"):
        render()
    assert writer_threads() == []


def test_a_cancel_is_heard_while_the_store_is_slow(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    stop = threading.Event()

    def render() -> None:
        with writer(store, max_pending_bytes=1, cancelled=stop.is_set) as out:
            out.put(picture(0))
            out.put(picture(1))

    thread, raised = in_thread(render)
    stop.set()
    thread.join(0.5)
    store.gate.set()
    thread.join(30)
    assert [type(error) for error in raised] == [CancelledError]
    assert store.puts <= 1
    assert writer_threads() == []


def test_a_picture_that_cannot_be_encoded_spoils_no_other(tmp_path: Path) -> None:
    broken = Picture(spec(0), np.zeros((4, 4, 3)), 0.1, nan=False)
    with writer(LocalStore(tmp_path)) as out:
        out.put(broken)
        out.put(picture(1))
        first, second = out.finish()
    assert first.object is None
    assert first.error is not None
    assert second.object is not None


def test_what_fails_after_a_picture_is_stored_ends_no_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def on_written() -> None:
        raise RuntimeError("nobody listens")

    with writer(LocalStore(tmp_path), threads=1, on_written=on_written) as out:
        for index in range(3):
            out.put(picture(index))
        assert [file.spec.index for file in out.finish()] == [0, 1, 2]
    assert caplog.messages == ["what follows a stored picture failed"] * 3
    assert writer_threads() == []


def test_flags_tell_black_and_constant_pictures() -> None:
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    dot = white.copy()
    dot[3, 3] = 0
    almost = black.copy()
    almost[0, 0] = 2
    assert [flag_of(pixels) for pixels in (black, almost, white, dot)] == ["black", "black", "constant", None]


def test_thumbnails_are_made_of_larger_pictures_only(tmp_path: Path) -> None:
    assert thumbnail(Image.new("RGB", (256, 100))) is None
    small = thumbnail(Image.new("RGB", (512, 256)))
    assert small is not None
    assert Image.open(io.BytesIO(small)).size == (256, 128)
    store = LocalStore(tmp_path)
    with writer(store) as out:
        out.put(picture(0, size=300))
        (written,) = out.finish()
    assert written.thumbnail is not None
    assert Image.open(io.BytesIO(store.get(written.thumbnail))).format == "WEBP"
