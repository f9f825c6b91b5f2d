import errno
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from farm.errors import InputError, StoreDeniedError, StoreFullError, VerifyError
from farm.export import finalise
from farm.pull import pull
from tests.unit.finished_jobs import commit_shard, make_job, make_ledger, make_plan, picture_bytes


def metadata(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]


def test_a_pulled_job_is_an_image_folder(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path / "store", failed={3})
    to = tmp_path / "pulled"
    pulled = pull(ledger, [plan], to)
    assert (pulled.pictures, pulled.kept, pulled.failed) == (9, 0, 1)
    lines = metadata(to)
    assert [line["index"] for line in lines] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert lines[0]["text"] == "shape number 0"
    assert lines[0]["seed"] == plan.seeds.seed(0, None, 0)
    assert str(lines[0]["file_name"]).startswith("images/0001/000000/000000000.p1a1-")
    for line in lines:
        assert (to / "train" / str(line["file_name"])).read_bytes() == picture_bytes(int(str(line["index"])))
    assert pq.read_table(to / "dataset" / "0001").num_rows == 10
    assert not list(to.rglob("*.part"))


def test_keys_that_read_like_splits_lie_in_one_split(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path / "store"), make_plan(rows=3, seeds=1)
    ledger.create_plan(plan, 1)
    commit_shard(ledger, plan, 0, keys=["train", "val", "cat"])
    to = tmp_path / "pulled"
    pull(ledger, [plan], to)
    assert [line["key"] for line in metadata(to)] == ["train", "val", "cat"]
    pictures = [path.relative_to(to) for path in to.rglob("*.png")]
    assert {path.parts[:2] for path in pictures} == {("train", "images")}
    assert sorted(path.stem.split("_")[1].partition(".")[0] for path in pictures) == ["cat", "train", "val"]
    assert [path.relative_to(to).as_posix() for path in to.rglob("metadata.jsonl")] == ["train/metadata.jsonl"]


def test_a_job_of_one_picture_is_an_image_folder_too(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path / "store"), make_plan(rows=1, seeds=1)
    ledger.create_plan(plan, 1)
    commit_shard(ledger, plan, 0)
    finalise(ledger, plan, 1)
    to = tmp_path / "pulled"
    pull(ledger, [plan], to)
    outside = sorted(path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file())
    assert [name for name in outside if not name.startswith("train/")] == [
        ".farm-pull.json",
        "dataset/0001/part-00000.parquet",
    ]
    assert len(list((to / "train").rglob("*.png"))) == 1


def test_metadata_is_json_where_a_carried_number_is_none(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path / "store"), make_plan(rows=1)
    ledger.create_plan(plan, 1)
    for shard in range(plan.shards):
        commit_shard(ledger, plan, shard, carry={0: {"score": float("nan")}, 1: {"score": 0.5}})
    pull(ledger, [plan], tmp_path / "pulled")
    assert [line["score"] for line in metadata(tmp_path / "pulled")] == [None, 0.5]


def test_pulling_again_copies_only_what_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, plan = make_job(tmp_path / "store")
    to = tmp_path / "pulled"
    pull(ledger, [plan], to)
    before = (to / "train" / "metadata.jsonl").read_bytes()
    lost = to / "train" / str(metadata(to)[4]["file_name"])
    lost.unlink()
    asked: list[str] = []
    real = ledger.store.get
    monkeypatch.setattr(ledger.store, "get", lambda key: asked.append(key) or real(key))
    pulled = pull(ledger, [plan], to)
    assert (pulled.pictures, pulled.kept) == (10, 9)
    assert [key for key in asked if "/images/" in key] == [key for key in asked if lost.name in key]
    assert lost.read_bytes() == picture_bytes(4)
    assert (to / "train" / "metadata.jsonl").read_bytes() == before


def test_runs_lie_side_by_side_in_one_metadata_file(tmp_path: Path) -> None:
    ledger, first = make_job(tmp_path / "store", rows=2)
    second = make_plan(run="99999999", rows=1)
    commit_shard(ledger, second, 0)
    pull(ledger, [first, second], tmp_path / "pulled")
    names = [str(line["file_name"]) for line in metadata(tmp_path / "pulled")]
    assert [name[:11] for name in names] == ["images/0001"] * 4 + ["images/0002"] * 2


def test_no_folder_of_pictures_grows_past_a_thousand(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path / "store"), make_plan(rows=1003, seeds=1, shard_images=2000)
    commit_shard(ledger, plan, 0, failed=range(1, 1001))
    pull(ledger, [plan], tmp_path / "pulled")
    folders = [path.name for path in sorted((tmp_path / "pulled" / "train" / "images" / "0001").iterdir())]
    assert folders == ["000000", "000001"]


@pytest.mark.parametrize("name", ["train/metadata.jsonl", "train/mine.png", "dataset/mine.parquet"])
def test_a_folder_with_somebodys_files_is_left_alone(tmp_path: Path, name: str) -> None:
    ledger, plan = make_job(tmp_path / "store")
    mine = tmp_path / "pulled" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match="that farm pull did not write; pull into another folder"):
        pull(ledger, [plan], tmp_path / "pulled")
    assert [path for path in (tmp_path / "pulled").rglob("*") if path.is_file()] == [mine]


def test_files_beside_ours_do_no_harm(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path / "store")
    (tmp_path / "pulled" / ".git").mkdir(parents=True)
    (tmp_path / "pulled" / "README.md").write_text("mine")
    assert pull(ledger, [plan], tmp_path / "pulled").pictures == 10
    assert (tmp_path / "pulled" / "README.md").read_text() == "mine"


def test_a_picture_that_somebody_changed_is_not_written_over(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path / "store")
    pull(ledger, [plan], tmp_path / "pulled")
    mine = tmp_path / "pulled" / "train" / str(metadata(tmp_path / "pulled")[0]["file_name"])
    mine.write_bytes(b"retouched")
    with pytest.raises(InputError, match="move it away, or pull into another folder"):
        pull(ledger, [plan], tmp_path / "pulled")
    assert mine.read_bytes() == b"retouched"


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path / "store")
    pull(ledger, [plan], tmp_path / "pulled")
    other_ledger, other = make_job(tmp_path / "other", job="others")
    with pytest.raises(InputError, match=r"holds job 'shapes' of .*, not 'others'"):
        pull(other_ledger, [other], tmp_path / "pulled")


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path / "store")
    (tmp_path / "pulled").write_text("a file")
    with pytest.raises(InputError, match="is a file; name a folder"):
        pull(ledger, [plan], tmp_path / "pulled")


def test_a_picture_that_is_not_what_its_row_says_stops_the_pull(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path / "store")
    next((tmp_path / "store").rglob("000000002.*.png")).write_bytes(b"rot")
    with pytest.raises(VerifyError, match="is not what its row says; farm verify lists what differs"):
        pull(ledger, [plan], tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "train" / "metadata.jsonl").exists()
    assert not list((tmp_path / "pulled").rglob("*.part"))


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, StoreFullError, "is full; free some space and run the same command again"),
        (errno.EACCES, StoreDeniedError, "cannot be written: Permission denied; pull into another folder"),
    ],
)
def test_a_full_or_forbidden_disk_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], message: str
) -> None:
    ledger, plan = make_job(tmp_path / "store")
    real = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if path.name.endswith(".png.part"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(error, match=message):
        pull(ledger, [plan], tmp_path / "pulled")
    monkeypatch.undo()
    assert not list((tmp_path / "pulled").rglob("*.png"))
    assert pull(ledger, [plan], tmp_path / "pulled").pictures == 10


def test_a_pilot_that_waits_is_pulled_alone_and_the_others_come_to_it_later(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path / "store"), make_plan(pilot=3)
    ledger.create_plan(plan, 1)
    commit_shard(ledger, plan, 0)
    finalise(ledger, plan, 1)
    to = tmp_path / "pulled"
    assert pull(ledger, [plan], to).pictures == 3
    assert [line["index"] for line in metadata(to)] == [0, 4, 6]
    assert pq.read_table(to / "dataset" / "0001").column("index").to_pylist() == [0, 4, 6]
    ledger.open_pass(plan, 2, None)
    for shard in (0, 1):
        commit_shard(ledger, plan, shard, pass_number=2)
    finalise(ledger, plan, 2)
    pulled = pull(ledger, [plan], to)
    assert (pulled.pictures, pulled.kept) == (10, 3)
    assert pq.read_table(to / "dataset" / "0001").column("index").to_pylist() == list(range(10))
