import time
from dataclasses import replace
from pathlib import Path

import pytest

from farm.errors import NewerVersionError, RecordError, UnknownImageError
from farm.modelcard import RenderParams
from farm.removal import Removed
from farm.singles import LATE_S, SCANNED, Single, Singles, single_id, until
from farm.storage.base import ObjectInfo
from farm.storage.local import LocalStore

NOW = 1_795_000_000.0
DAY = 24 * 3600.0


class Aged(LocalStore):
    """A folder whose file system says that every object was written so many seconds earlier."""

    def __init__(self, folder: Path, age: float = 0.0):
        super().__init__(folder)
        self.age = age

    def _info(self, key: str, path: Path) -> ObjectInfo | None:
        info = super()._info(key, path)
        return info and replace(info, modified_at=info.modified_at - self.age)


def make(now: float = NOW, *, number: int = 0, days: float | None = 30.0, **fields: object) -> Single:
    values = {
        "id": single_id(now, lambda bits: number),
        "created_at": until(now, 0),
        "keep_until": None if days is None else until(now, days),
        "owner": "ann",
        "model": "sketch",
        "prompt": "a red square on blue",
        "seed": 7,
        "params": RenderParams(width=64, height=64, num_inference_steps=4, guidance_scale=2.5),
        "format": "png",
        "size_bytes": 7,
        "sha256": "0" * 64,
        "seconds": 0.5,
        "renderer": "renderer-0",
        "device": "CPU",
    }
    return Single.model_validate(values | fields)


def keys(store: LocalStore) -> list[str]:
    return [info.key for info in store.list("")]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def singles(store: LocalStore) -> Singles:
    return Singles(store)


def test_an_image_that_was_put_is_found_with_its_picture(singles: Singles, store: LocalStore) -> None:
    single = make()
    singles.put(single, b"picture")
    assert single.id == "20261118-46400000-000000000000"
    assert singles.get(single.id, now=NOW) == single
    assert singles.picture(single) == b"picture"
    assert singles.link(single, 3600) is None
    assert keys(store) == [
        f"singles/20261118/{single.id}.json",
        f"singles/20261118/pictures/{single.id}.png",
    ]


def test_ids_of_a_day_count_down_and_are_unique() -> None:
    ids = [single_id(NOW + second) for second in range(100)]
    assert ids == sorted(ids, reverse=True)
    assert len({single_id(NOW) for _ in range(100)}) == 100
    assert single_id(1_795_046_400.0 - 0.001, lambda bits: 2**48 - 1) == "20261118-00000001-ffffffffffff"
    assert single_id(1_795_046_400.0, lambda bits: 0) == "20261119-86400000-000000000000"


@pytest.mark.parametrize(
    "id",
    [
        "",
        "x",
        "../../etc/passwd",
        "20261118-46400000-00000000000G",
        "20261118-46400000-000000000000/..",
        "20261118\n",
        "20261118-46400000-0000000000000",
        "٢٠٢٦١١١٨-46400000-000000000000",
        "x" * 500,
    ],
)
def test_what_is_no_id_reaches_no_store(singles: Singles, id: str) -> None:
    for call in (singles.get, singles.delete, lambda id, now: singles.keep(id, now=now, days=1)):
        with pytest.raises(UnknownImageError, match="no single image"):
            call(id, now=NOW)


def test_an_image_is_unknown_from_its_time_on(singles: Singles) -> None:
    single = make(days=1)
    singles.put(single, b"picture")
    assert singles.get(single.id, now=NOW + DAY - 1) == single
    with pytest.raises(UnknownImageError, match="it may have expired"):
        singles.get(single.id, now=NOW + DAY)
    assert singles.list(now=NOW + DAY, limit=10).singles == ()


def test_a_list_has_the_newest_first_over_days(singles: Singles) -> None:
    made = [make(NOW + hours * 3600, number=hours) for hours in range(0, 72, 5)]
    for single in made:
        singles.put(single, b"picture")
    found = singles.list(now=NOW, limit=100)
    assert list(found.singles) == made[::-1]
    assert found.after is None
    assert found.damaged == ()


def test_pages_follow_one_another_without_gap_or_double(singles: Singles) -> None:
    made = [make(NOW + hours * 3600, number=hours) for hours in range(0, 72, 5)]
    for single in made:
        singles.put(single, b"picture")
    found, after = [], None
    while True:
        page = singles.list(now=NOW, limit=4, after=after)
        found += page.singles
        after = page.after
        singles.put(make(NOW + 100 * 3600, number=len(found)), b"picture")  # what is new disturbs no pages
        if after is None:
            break
    assert found == made[::-1]


def test_a_search_looks_at_owner_model_and_words(singles: Singles) -> None:
    singles.put(make(NOW, prompt="A RED fox, drawn"), b"")
    singles.put(make(NOW + 1, prompt="a red square", owner="bob"), b"")
    singles.put(make(NOW + 2, prompt="ein roter Fuß", model="other"), b"")

    def search(**query: object) -> list[str]:
        return [one.prompt for one in singles.list(now=NOW, limit=10, **query).singles]

    assert search(words="fox red") == ["A RED fox, drawn"]
    assert search(words="FUSS") == ["ein roter Fuß"]
    assert search(owner="bob") == ["a red square"]
    assert search(model="other") == ["ein roter Fuß"]
    assert search(words="red", owner="nobody") == []
    assert len(search(words="  ")) == 3


def test_a_search_that_passes_over_many_says_where_it_stopped(
    singles: Singles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.singles.SCANNED", 3)
    assert SCANNED == 2000
    for second in range(7):
        singles.put(make(NOW + second, prompt="wanted" if second == 0 else "other"), b"")
    first = singles.list(now=NOW, limit=1, words="wanted")
    second = singles.list(now=NOW, limit=1, words="wanted", after=first.after)
    third = singles.list(now=NOW, limit=1, words="wanted", after=second.after)
    assert (first.singles, second.singles) == ((), ())
    assert [one.prompt for one in third.singles] == ["wanted"]


def test_a_damaged_record_hides_no_other(singles: Singles, store: LocalStore) -> None:
    whole, damaged = make(NOW), make(NOW + 1)
    singles.put(whole, b"picture")
    singles.put(damaged, b"picture")
    store.put(f"singles/20261118/{damaged.id}.json", b"{}")
    page = singles.list(now=NOW, limit=10)
    assert (page.singles, page.damaged) == ((whole,), (damaged.id,))
    with pytest.raises(RecordError, match=r"\.json: not a single image \(id: Field required\); restore the object"):
        singles.get(damaged.id, now=NOW)
    store.put(f"singles/20261118/{damaged.id}.json", b'{"version": 99}')
    with pytest.raises(NewerVersionError, match="version 99 was written by a newer farm"):
        singles.get(damaged.id, now=NOW)


def test_what_is_kept_longer_or_for_good_lasts(singles: Singles) -> None:
    single = make(days=1)
    singles.put(single, b"picture")
    kept = singles.keep(single.id, now=NOW, days=3)
    assert kept.keep_until == until(NOW, 3)
    assert singles.get(single.id, now=NOW + 2 * DAY) == kept
    assert singles.keep(single.id, now=NOW + 2 * DAY, days=None).keep_until is None
    assert singles.get(single.id, now=NOW + 1000 * DAY).keep_until is None


def test_an_image_that_is_deleted_is_gone_with_its_picture(singles: Singles, store: LocalStore) -> None:
    single = make()
    singles.put(single, b"picture")
    singles.delete(single.id, now=NOW)
    assert keys(store) == []
    with pytest.raises(UnknownImageError):
        singles.delete(single.id, now=NOW)
    with pytest.raises(UnknownImageError):
        singles.picture(single)


def test_a_sweep_takes_what_is_past_its_time_and_leaves_the_rest(singles: Singles, store: LocalStore) -> None:
    gone = [make(NOW + second, number=second, days=1, size_bytes=7) for second in range(3)]
    kept = [make(NOW + 10, days=None), make(NOW + 11, days=2)]
    for single in gone + kept:
        singles.put(single, b"picture")
    later = NOW + DAY + LATE_S + 60
    before = keys(store)
    counted = singles.sweep(now=later, before=0.0, remove=False)
    assert keys(store) == before
    assert counted.removed.objects == 6
    assert singles.sweep(now=NOW + DAY + 60, before=0.0).removed == Removed()  # a slow clock may still ask for them
    swept = singles.sweep(now=later, before=0.0)
    assert swept.removed.objects == 6
    assert swept.kept == []
    assert list(singles.list(now=NOW, limit=10).singles) == kept[::-1]
    assert len(keys(store)) == 4


def test_a_sweep_takes_old_pictures_without_a_record_and_no_young_ones(tmp_path: Path) -> None:
    store = Aged(tmp_path, age=2 * DAY)
    singles = Singles(store)
    whole = make(days=None)
    singles.put(whole, b"picture")
    store.put(make(NOW + 5).picture_key, b"lost")
    before = time.time() - DAY
    store.age = 0.0
    assert singles.sweep(now=NOW, before=before).removed == Removed()
    store.age = 2 * DAY
    assert singles.sweep(now=NOW, before=before).removed == Removed(1, 4)
    assert singles.picture(whole) == b"picture"


def test_a_sweep_names_what_it_cannot_read(singles: Singles, store: LocalStore) -> None:
    single = make()
    singles.put(single, b"picture")
    key = f"singles/20261118/{single.id}.json"
    store.put(key, b"no record")
    swept = singles.sweep(now=NOW + 1000 * DAY, before=0.0)
    assert [where for where, _ in swept.kept] == [key]
    assert singles.picture(single) == b"picture"
