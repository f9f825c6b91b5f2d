import json

import pytest
from PIL import Image

from tests.unit.cli.conftest import Place
from tests.unit.finished_jobs import make_job


def test_verify_of_a_sound_job(farm: Place) -> None:
    make_job(farm.store, failed={3})
    ended = farm("verify", "shapes")
    assert ended.code == 0
    assert ended.out.startswith("shapes, run 0a1b2c3d: 10 rows of 10 images, 1 failed, 9 pictures read (")
    assert ended.out.endswith("all sound\n")


def test_verify_names_what_differs_and_ends_with_code_7(farm: Place) -> None:
    make_job(farm.store)
    next(farm.store.rglob("000000004.*.png")).unlink()
    ended = farm("verify", "shapes")
    assert ended.code == 7
    assert ended.out.splitlines()[0].startswith("object_missing: image 4: jobs/shapes/0a1b2c3d/images/000000/000000004")
    assert ended.out.endswith("1 finding\n")
    record = json.loads(farm("verify", "shapes", "--json").out)
    assert record["sound"] is False
    assert record["findings"][0]["index"] == 4


def test_verify_reads_a_sample(farm: Place) -> None:
    make_job(farm.store)
    record = json.loads(farm("verify", "shapes", "--sample", "3", "--json").out)
    assert record["runs"][0]["checked"] == 3


def test_verify_can_write_the_dataset_again(farm: Place) -> None:
    make_job(farm.store)
    next(farm.store.rglob("part-00000.parquet")).write_bytes(b"rot")
    assert farm("verify", "shapes").code == 7
    assert farm("verify", "shapes", "--rewrite").code == 0


def test_pull_copies_a_job_and_says_what_was_there(farm: Place) -> None:
    make_job(farm.store, failed={3})
    first = farm("pull", "shapes", "--to", "out")
    assert first.code == 0
    assert first.out.startswith("shapes: 9 pictures, ")
    assert "1 image failed and has no picture" in first.err
    again = farm("pull", "shapes", "--to", "out")
    assert "9 of them were there" in again.out
    assert json.loads(farm("pull", "shapes", "--to", "out", "--json").out)["kept"] == 9


def test_pull_refuses_somebodys_folder(farm: Place) -> None:
    make_job(farm.store)
    (farm.folder / "out" / "train").mkdir(parents=True)
    farm.write("out/train/metadata.jsonl", "mine")
    ended = farm("pull", "shapes", "--to", "out")
    assert ended.code == 2
    assert "pull into another folder" in ended.error
    assert [path.name for path in (farm.folder / "out").iterdir()] == ["train"]


def test_pull_of_a_job_that_is_not_done_takes_what_is_there(farm: Place) -> None:
    make_job(farm.store, shards=1)
    ended = farm("pull", "shapes", "--to", "out")
    assert ended.out.startswith("shapes: 4 pictures")
    assert "shapes is not done; what is there is copied (4 of 10 images)" in ended.err


@pytest.mark.parametrize("name", ["nothing.png", "text.png", "plain.png"])
def test_reproduce_wants_a_picture_with_provenance(farm: Place, name: str) -> None:
    farm.write("text.png", "no picture")
    Image.new("RGB", (8, 8)).save(farm.folder / "plain.png")
    ended = farm("reproduce", name)
    assert ended.code == 2
    assert ended.error.startswith(name)
