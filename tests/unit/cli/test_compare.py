import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.unit.cli.conftest import FakeFarm, Place


def save(path: Path, value: int) -> str:
    Image.fromarray(np.full((64, 64, 3), value, dtype=np.uint8)).save(path)
    return str(path)


def test_two_jobs_are_compared_by_index(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest(name="few"))
    farm("render", farm.manifest(name="many", params={"num_inference_steps": 8}))
    ended = farm("compare", "few", "many")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("A  few: job, 10 pictures, ")
    assert "  pictures    10 pairs, 10 of equal pixels\n" in ended.out
    assert ended.out.count("  equal\n") == 10


def test_two_pictures_say_how_far_they_are_apart(farm: Place) -> None:
    a, b = save(farm.folder / "a.png", 100), save(farm.folder / "b.png", 110)
    ended = farm("compare", a, b)
    assert ended.code == 0
    assert "  differs     nothing that is known\n" in ended.out
    assert "  apart       10 of 255 levels on average, PSNR 28.1 dB (the median of those that differ)\n" in ended.out
    record = json.loads(farm("compare", a, b, "--json").out)
    assert (record["mean_absolute"], record["pairs"][0]["most"], record["out"]) == (10.0, 10, None)


def test_out_gets_a_sheet_and_a_record_and_writes_over_neither(farm: Place) -> None:
    a, b = save(farm.folder / "a.png", 100), save(farm.folder / "b.png", 110)
    assert farm("compare", a, b, "--out", "both").code == 0
    assert sorted(path.name for path in (farm.folder / "both").iterdir()) == ["compare.json", "pairs.png"]
    ended = farm("compare", a, b, "--out", "both")
    assert (ended.code, ended.error) == (2, "--out both: holds pairs.png already; name another folder")


def test_what_has_nothing_in_common_is_refused(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest(name="few"))
    ended = farm("compare", "few", "nothing")
    assert ended.code == 2
    assert ended.error.startswith("no job 'nothing' in ")


def test_deep_and_transparent_pictures_are_not_said_to_be_equal(farm: Place) -> None:
    save(farm.folder / "b.png", 100)
    Image.fromarray(np.full((64, 64), 300, dtype=np.uint16)).save(farm.folder / "deep.png")
    ended = farm("compare", "deep.png", "deep.png")
    assert ended.code == 0
    assert "  deep.png: has 16 bits a channel; only grey and RGB of 8 bits a channel are compared" in ended.out
    Image.fromarray(np.full((64, 64, 4), 100, dtype=np.uint8)).save(farm.folder / "clear.png")
    ended = farm("compare", "clear.png", "b.png", "--out", "both")
    assert ended.code == 0, ended.err
    assert "  pictures    1 pair, 0 of equal pixels\n" in ended.out
    assert (farm.folder / "both" / "pairs.png").is_file()


def test_no_pairs_at_all_are_refused(farm: Place) -> None:
    ended = farm("compare", "a.png", "b.png", "--images", "0")
    assert (ended.code, ended.error) == (2, "--images 0: must be 1 or more")


def test_an_empty_name_is_refused(farm: Place) -> None:
    ended = farm("compare", "", "b.png")
    assert (ended.code, ended.error[:32]) == (2, "an empty name stands for nothing")
