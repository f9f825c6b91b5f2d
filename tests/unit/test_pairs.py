import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farm.cardparts import PLAIN, Acceleration
from farm.errors import InputError, PictureError, UnknownJobError
from farm.ledger import Ledger
from farm.pairs import Side, SideBySide, amplified, difference, open_side, side_by_side
from farm.plan import Plan, card_identity
from farm.provenance import Provenance, encode_picture, pixels_sha256
from tests.drawing import card, numerics
from tests.unit.finished_jobs import commit_shard, make_ledger, make_plan, render_pass


def flat(value: int, side: int = 64) -> np.ndarray:
    return np.full((side, side, 3), value, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def sixteen_bits(value: int, channels: int) -> bytes:
    """A PNG of 8 x 8 pixels of 16 bits a channel, grey or RGB, which Pillow does not write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">H", value) * 8 * (channels or 1)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2 if channels else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")


def no_ledger() -> Ledger:
    raise AssertionError("a path needs no store")


def finish(ledger: Ledger, plan: Plan) -> None:
    ledger.create_plan(plan, 1)
    render_pass(ledger, plan, 1)


def compared(a: Side, b: Side, *, most: int = 100) -> SideBySide:
    found, pairs = side_by_side(a, b, most=most)
    for _ in pairs:
        pass
    return found


def test_a_difference_is_in_levels_and_decibels() -> None:
    found = difference(flat(100), flat(110))
    assert (found.mean_absolute, found.most, found.differing) == (10.0, 10, 1.0)
    assert found.psnr_db == pytest.approx(28.1308, abs=1e-4)  # 20 log10(255 / 10)
    assert difference(flat(0), flat(255)).psnr_db == 0.0
    assert difference(flat(7), flat(7)).psnr_db is None


def test_one_pixel_counts_as_one_of_all() -> None:
    other = flat(100)
    other[3, 4, 1] = 160
    found = difference(flat(100), other)
    assert (found.most, found.differing) == (60, 1 / 4096)
    assert found.mean_absolute == pytest.approx(60 / (64 * 64 * 3))


def test_an_amplified_difference_is_clipped() -> None:
    assert amplified(flat(10), flat(14), times=8)[0, 0].tolist() == [32, 32, 32]
    assert amplified(flat(0), flat(200), times=8)[0, 0].tolist() == [255, 255, 255]


def test_two_files_are_a_pair(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png", flat(10)), save(tmp_path / "b.png", flat(12))
    found = compared(open_side(str(a), no_ledger), open_side(str(b), no_ledger))
    assert [pair.difference and pair.difference.mean_absolute for pair in found.pairs] == [2.0]
    assert found.record()["mean_absolute"] == 2.0


def test_folders_pair_by_name_and_count_what_stays_alone(tmp_path: Path) -> None:
    for name in ("one", "two", "sheet"):
        save(tmp_path / "a" / f"{name}.png", flat(10))
    for name in ("two", "three", "four"):
        save(tmp_path / "b" / f"{name}.webp", flat(10))
    found = compared(open_side(str(tmp_path / "a"), no_ledger), open_side(str(tmp_path / "b"), no_ledger))
    assert [pair.label for pair in found.pairs] == ["two"]
    assert (found.only_a, found.only_b) == (1, 2)


def test_one_picture_pairs_with_one_whatever_their_names(tmp_path: Path) -> None:
    save(tmp_path / "a" / "001.png", flat(10))
    save(tmp_path / "b" / "x.png", flat(30))
    found = compared(open_side(str(tmp_path / "a"), no_ledger), open_side(str(tmp_path / "b"), no_ledger))
    assert [pair.difference and pair.difference.most for pair in found.pairs] == [20]


def test_folders_without_a_common_name_are_not_paired_by_order(tmp_path: Path) -> None:
    for name in ("a/001", "a/002", "b/x", "b/y"):
        save(tmp_path / f"{name}.png", flat(10))
    with pytest.raises(
        InputError, match="have no picture in common: 2 and 2 pictures, of other keys, indexes or names"
    ):
        compared(open_side(str(tmp_path / "a"), no_ledger), open_side(str(tmp_path / "b"), no_ledger))


def test_a_job_and_a_folder_are_not_paired_by_order(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    finish(ledger, make_plan(job="a"))
    for name in ("x", "y"):
        save(tmp_path / "b" / f"{name}.png", flat(10))
    with pytest.raises(InputError, match="have no picture in common: 10 and 2 pictures"):
        compared(open_side("a", lambda: ledger), open_side(str(tmp_path / "b"), no_ledger))


def test_stems_that_collide_pair_by_the_whole_name(tmp_path: Path) -> None:
    for name in ("a/one.png", "a/one.webp", "a/two.png", "b/one.png", "b/two.webp", "b/three.png"):
        save(tmp_path / name, flat(10))
    a, b = open_side(str(tmp_path / "a"), no_ledger), open_side(str(tmp_path / "b"), no_ledger)
    assert len(a.pictures) == 3
    found = compared(a, b)
    assert [pair.label for pair in found.pairs] == ["one.png", "two"]
    assert (found.only_a, found.only_b) == (1, 1)
    both = compared(a, a)
    assert [pair.label for pair in both.pairs] == ["one.png", "one.webp", "two"]


@pytest.mark.parametrize("channels", [0, 3])
def test_sixteen_bits_are_a_note_on_their_pair_and_the_others_are_compared(tmp_path: Path, channels: int) -> None:
    for side, low in (("a", 0), ("b", 255)):
        save(tmp_path / side / "8.png", flat(10))
        (tmp_path / side / "16.png").write_bytes(sixteen_bits(0x1200 + low, channels))
    found = compared(open_side(str(tmp_path / "a"), no_ledger), open_side(str(tmp_path / "b"), no_ledger))
    deep, plain = found.pairs
    assert deep.difference is None
    assert f"{tmp_path / 'a' / '16.png'}: has 16 bits a channel; only grey and RGB of 8 bits a channel" in deep.note
    assert plain.difference == difference(flat(1), flat(1))


def test_pictures_that_differ_in_alpha_alone_are_not_equal(tmp_path: Path) -> None:
    half = np.dstack((flat(10), np.full((64, 64), 55, dtype=np.uint8)))
    opaque = np.dstack((flat(10), np.full((64, 64), 255, dtype=np.uint8)))
    names = [
        str(save(tmp_path / f"{name}.png", pixels)) for name, pixels in (("a", half), ("b", flat(10)), ("c", opaque))
    ]
    sides = [open_side(name, no_ledger) for name in names]
    (pair,) = compared(sides[0], sides[1]).pairs
    assert pair.difference is not None
    assert (pair.difference.most, pair.difference.mean_absolute, pair.difference.differing) == (200, 50.0, 1.0)
    assert compared(sides[1], sides[2]).record()["identical"] == 1
    assert amplified(half, opaque, times=1)[0, 0].tolist() == [200, 200, 200]


def test_an_unreadable_picture_of_a_folder_is_a_note_and_one_that_is_named_an_error(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        save(tmp_path / name, flat(10))
    broken = tmp_path / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:70])
    found = compared(open_side(str(tmp_path / "a"), no_ledger), open_side(str(tmp_path / "b"), no_ledger))
    assert found.pairs[0].note.startswith(f"{broken}: cannot be read as a picture: ")
    assert [pair.difference is None for pair in found.pairs] == [True, False]
    with pytest.raises(PictureError, match=r"1\.png: cannot be read as a picture: "):
        open_side(str(broken), no_ledger)


def test_names_that_cannot_be_looked_up_are_input_errors(tmp_path: Path) -> None:
    for name in ("", "  "):
        with pytest.raises(InputError, match="an empty name stands for nothing; name a picture"):
            open_side(name, no_ledger)
    with pytest.raises(InputError, match=r"^x{100}…: cannot be read: File name too long; name pictures"):
        open_side("x" * 5000, no_ledger)


def test_a_folder_that_refuses_a_look_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match=r"^locked/a\.png: cannot be read: Permission denied; name pictures"):
        open_side("locked/a.png", no_ledger)


def test_pictures_of_other_sizes_are_shown_and_not_compared(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png", flat(10)), save(tmp_path / "b.png", flat(10, side=32))
    (pair,) = compared(open_side(str(a), no_ledger), open_side(str(b), no_ledger)).pairs
    assert pair.difference is None
    assert pair.note == "64x64 and 32x32: only pictures of one size are compared"


def test_a_benchmarks_folder_brings_its_seconds_and_memory(tmp_path: Path) -> None:
    save(tmp_path / "pictures" / "001.png", flat(10))
    record = {
        "warm": {"whole picture": {"median": 2.5}},
        "memory": {"peak_gib": {"load": 1.0, "denoise": 9.5}},
        "device": "a GPU",
    }
    (tmp_path / "bench.json").write_text(json.dumps(record))
    side = open_side(str(tmp_path), no_ledger)
    assert (side.kind, side.seconds, side.peak_gib, side.devices) == ("benchmark", 2.5, 9.5, ("a GPU",))
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(PictureError, match=r"bench\.json: is no record of farm bench; run it again"):
        open_side(str(tmp_path), no_ledger)


def test_jobs_pair_by_index_and_say_their_seconds(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    a, b = make_plan(job="a"), make_plan(job="b", run="11112222")
    finish(ledger, a)
    finish(ledger, b)
    found = compared(open_side("a", lambda: ledger), open_side("b/11112222", lambda: ledger))
    assert (found.paired, len(found.compared()), found.record()["identical"]) == (10, 10, 10)
    assert found.a.seconds is not None
    assert found.a.gpu_seconds is not None
    assert found.changes == ()
    assert found.b.name == "b/11112222"


def test_only_so_many_pairs_are_looked_at_spread_evenly(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    finish(ledger, make_plan(job="a"))
    found = compared(open_side("a", lambda: ledger), open_side("a", lambda: ledger), most=3)
    assert [pair.label for pair in found.pairs] == ["0", "3", "6"]
    assert found.paired == 10


def test_a_failed_image_is_a_pair_without_a_difference(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    a, b = make_plan(job="a"), make_plan(job="b")
    finish(ledger, a)
    ledger.create_plan(b, 1)
    for shard in range(3):
        commit_shard(ledger, b, shard, failed=[1])
    found = compared(open_side("a", lambda: ledger), open_side("b", lambda: ledger))
    assert found.pairs[1].note == "no picture in b"
    assert len(found.compared()) == 9


def test_a_name_that_is_nothing_says_what_may_be_named(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    finish(ledger, make_plan(job="a"))
    with pytest.raises(InputError, match=r"pictures/a\.png: there is no such file or folder"):
        open_side("pictures/a.png", lambda: ledger)
    with pytest.raises(UnknownJobError, match="no job 'b'"):
        open_side("b", lambda: ledger)
    with pytest.raises(UnknownJobError, match="job a has no run 99999999; its newest is 0a1b2c3d"):
        open_side("a/99999999", lambda: ledger)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no PNG, JPEG or WebP picture"):
        open_side(str(tmp_path / "empty"), no_ledger)


def drawn_with(path: Path, how: Acceleration) -> Side:
    """Two pictures of a card that is accelerated like this on a CPU."""
    described = card(acceleration={"cpu": how})
    for seed in (1, 2):
        provenance = Provenance(
            index=seed,
            key=None,
            prompt="a red circle",
            seed=seed,
            params=described.defaults,
            model=card_identity(described, "cpu"),
            numerics=numerics(),
            plan="",
            format="png",
            quality=None,
            pixels_sha256=pixels_sha256(flat(seed)),
        )
        path.mkdir(exist_ok=True)
        (path / f"{seed}.png").write_bytes(encode_picture(flat(seed), provenance))
    return open_side(str(path), no_ledger)


def test_pictures_of_a_card_with_and_without_acceleration_say_so(tmp_path: Path) -> None:
    plain, quick = drawn_with(tmp_path / "a", PLAIN), drawn_with(tmp_path / "b", Acceleration(compile=True))
    assert compared(plain, plain).changes == ()
    assert compared(plain, quick).changes == ("model.acceleration.compile: none -> true",)


def test_what_a_strangers_picture_says_of_its_model_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    odd = drawn_with(tmp_path / "a", PLAIN)
    other = drawn_with(tmp_path / "b", PLAIN)
    model = {"name": "tiny", "\x1b[2J": 1} | {f"key{number}": number for number in range(100)}
    pictures = {name: replace(one, params={**one.params, "model": model}) for name, one in odd.pictures.items()}
    changes = compared(replace(odd, pictures=pictures), other).changes
    assert len(changes) == 51
    assert changes[-1].startswith("and ")
    assert all(change.isprintable() for change in changes)
