"""Single images over HTTP."""

import hashlib
from pathlib import Path

import pytest

from farm.singles import Single, single_id, until
from tests.unit.finished_jobs import CARD, picture_bytes
from tests.unit.server.farm_at_rest import NOW, FarmAtRest, asking


def keep(farm: FarmAtRest, number: int, **fields: object) -> Single:
    data = picture_bytes(number)
    now = NOW + number
    single = Single.model_validate(
        {
            "id": single_id(now, lambda bits: number),
            "created_at": until(now, 0),
            "keep_until": until(now, 30),
            "owner": "me",
            "key": "0123456789ab",
            "user": "user-7",
            "model": "shapes",
            "prompt": f"shape number {number}",
            "seed": number,
            "params": CARD.defaults,
            "format": "png",
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": 0.5,
            "renderer": "renderer-0",
            "device": "CPU",
        }
        | fields
    )
    farm.services.singles.put(single, data)
    return single


def test_an_image_says_what_it_was_made_from(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    single = keep(farm, 3)
    answer = asking(farm, lambda client: client.get(f"/v1/images/{single.id}"))
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "image",
        "id": single.id,
        "created_at": "2026-11-18T11:06:43+00:00",
        "keep_until": "2026-12-18T11:06:43+00:00",
        "owner": "me",
        "user": "user-7",
        "model": "shapes",
        "prompt": "shape number 3",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "seed": 3,
        "format": "png",
        "size_bytes": single.size_bytes,
        "sha256": single.sha256,
        "seconds": 0.5,
        "renderer": "renderer-0",
        "device": "CPU",
        "flag": None,
        "warnings": None,
        "url": f"http://127.0.0.1:8000/v1/images/{single.id}/content",
    }


def test_its_picture_is_the_file_with_an_etag_of_what_is_in_it(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    single = keep(farm, 3)
    path = f"/v1/images/{single.id}/content"
    answer = asking(farm, lambda client: client.get(path))
    assert answer.content == picture_bytes(3)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["etag"] == f'"{single.sha256}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"] == f'inline; filename="{single.id}.png"'
    for etag in (answer.headers["etag"], f'"x", W/{answer.headers["etag"]}', "*"):
        again = asking(farm, lambda client, etag=etag: client.get(path, headers={"if-none-match": etag}))
        assert (again.status_code, again.content) == (304, b"")
    assert asking(farm, lambda client: client.get(path, headers={"if-none-match": '"x"'})).status_code == 200


def test_images_are_listed_in_pages_and_searched(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    made = [keep(farm, number, owner="ann" if number % 2 else "bob") for number in range(5)]

    async def pages(client):
        found, cursor = [], None
        while True:
            query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
            page = (await client.get("/v1/images", params=query)).json()
            assert page["object"] == "list"
            assert page["damaged"] == []
            found += [one["id"] for one in page["data"]]
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    assert asking(farm, pages) == [single.id for single in made[::-1]]
    found = asking(farm, lambda client: client.get("/v1/images", params={"q": "NUMBER 3", "owner": "ann"})).json()
    assert [one["prompt"] for one in found["data"]] == ["shape number 3"]
    assert asking(farm, lambda client: client.get("/v1/images", params={"model": "other"})).json()["data"] == []


@pytest.mark.parametrize("cursor", ["x", "", "../..", "20261118", "%00", "a" * 100])
def test_a_cursor_that_is_none_is_refused(tmp_path: Path, cursor: str) -> None:
    answer = asking(FarmAtRest(tmp_path), lambda client: client.get("/v1/images", params={"cursor": cursor}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cursor"


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"q": "x" * 1001}])
def test_queries_out_of_bounds_are_refused(tmp_path: Path, query: dict[str, object]) -> None:
    answer = asking(FarmAtRest(tmp_path), lambda client: client.get("/v1/images", params=query))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(query)))


@pytest.mark.parametrize("id", ["x", "20261118-46400000-000000000000", "%2e%2e%2fkeys", "..%00", "ü"])
def test_an_unknown_image_is_not_found(tmp_path: Path, id: str) -> None:
    farm = FarmAtRest(tmp_path)
    for path in (f"/v1/images/{id}", f"/v1/images/{id}/content"):
        answer = asking(farm, lambda client, path=path: client.get(path))
        assert answer.status_code == 404, answer.text
    assert asking(farm, lambda client: client.delete(f"/v1/images/{id}")).status_code == 404


def test_an_image_past_its_time_is_not_found(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    single = keep(farm, 3)
    farm.now += 31 * 24 * 3600
    answer = asking(farm, lambda client: client.get(f"/v1/images/{single.id}/content"))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_image"


def test_an_image_is_kept_for_days_or_for_good(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    single = keep(farm, 3)
    path = f"/v1/images/{single.id}/keep"
    assert asking(farm, lambda client: client.post(path, json={"days": 100})).json()["keep_until"] == until(NOW, 100)
    assert asking(farm, lambda client: client.post(path, json={})).json()["keep_until"] is None
    assert asking(farm, lambda client: client.post(path, json={"days": 0.5})).json()["keep_until"] == until(NOW, 0.5)
    assert asking(farm, lambda client: client.post(path)).json()["keep_until"] is None


@pytest.mark.parametrize("body", [{"days": 0}, {"days": -1}, {"days": "3"}, {"days": 1e9}, {"weeks": 1}, [], "x"])
def test_days_that_cannot_be_are_refused(tmp_path: Path, body: object) -> None:
    farm = FarmAtRest(tmp_path)
    single = keep(farm, 3)
    answer = asking(farm, lambda client: client.post(f"/v1/images/{single.id}/keep", json=body))
    assert answer.status_code == 400
    assert farm.services.singles.get(single.id, now=NOW) == single


def test_only_its_owner_or_an_administrator_keeps_and_deletes_an_image(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    single = keep(farm, 3, owner="ann")
    bob, reader, admin = farm.key("bob", "render"), farm.key("ann", "read"), farm.key("root", "admin")
    for key in (bob, reader):
        for ask in (
            lambda client: client.delete(f"/v1/images/{single.id}"),
            lambda client: client.post(f"/v1/images/{single.id}/keep", json={"days": 1}),
        ):
            answer = asking(farm, ask, key=key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert asking(farm, lambda client: client.get(f"/v1/images/{single.id}"), key=key).status_code == 200
    answer = asking(farm, lambda client: client.delete(f"/v1/images/{single.id}"), key=admin)
    assert (answer.status_code, answer.json()) == (200, {"id": single.id, "deleted": True})
    assert asking(farm, lambda client: client.get(f"/v1/images/{single.id}"), key=admin).status_code == 404


def test_a_damaged_record_is_named_in_the_list(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    whole, damaged = keep(farm, 3), keep(farm, 4)
    farm.ledger.store.put(f"singles/20261118/{damaged.id}.json", b"{}")
    page = asking(farm, lambda client: client.get("/v1/images")).json()
    assert [one["id"] for one in page["data"]] == [whole.id]
    assert page["damaged"] == [damaged.id]
