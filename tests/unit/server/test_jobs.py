"""Jobs over HTTP: submitting, reading, and what people say to one."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from farm.errors import StoreDeniedError, StoreUnavailableError
from farm.export import finalise
from farm.jobrecord import job_record
from farm.ledger import Ledger
from farm.portion import Allowance, Refusal
from farm.removal import delete_job
from farm.run import JobProgress
from farm.server import manifests
from farm.server.threads import Threads
from farm.status import job_status
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import commit_shard, make_job, make_plan, picture_bytes, render_pass
from tests.unit.server.farm_at_rest import FarmAtRest, asking

MANIFEST = {"name": "captions", "model": "sketch", "prompts": ["a red square", "a blue circle"]}
YAML = "name: captions\nmodel: sketch\nprompts:\n  - a red square\n  - a blue circle\n"


def put(farm: FarmAtRest, body: Any = MANIFEST, *, name: str = "captions", key: str | None = None, **query: Any) -> Any:
    return asking(farm, lambda client: client.put(f"/v1/jobs/{name}", json=body, params=query), key=key)


def get(farm: FarmAtRest, path: str, key: str | None = None, **query: Any) -> Any:
    return asking(farm, lambda client: client.get(path, params=query), key=key)


def post(farm: FarmAtRest, path: str, body: Any = None, key: str | None = None) -> Any:
    sent = {} if body is None else {"json": body}
    return asking(farm, lambda client: client.post(path, **sent), key=key)


def finished(folder: Path, **job: Any) -> FarmAtRest:
    make_job(folder / "store", **job)
    return FarmAtRest(folder)


def message(answer: Any) -> str:
    return str(answer.json()["error"]["message"])


# Submitting


def test_a_scene_becomes_the_prompt_that_is_drawn_and_warnings_come_with_the_answer(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    body = MANIFEST | {"prompts": ["a red square", {"general_tags": {"style": "anime_style"}}]}
    made = put(farm, body)
    assert made.status_code == 201, made.text
    text = "a structured prompt, which models of the family z-image take for plain words; say it in sentences"
    assert made.json()["warnings"] == [{"code": "xml_unread", "text": text, "where": "manifest: prompt 2"}]
    plan = farm.ledger.plans("captions")[0]
    assert plan.manifest.prompts == (
        "a red square",
        "<general_tags>\n<style>anime_style</style>\n</general_tags>",
    )
    assert put(farm, body).json()["warnings"] == made.json()["warnings"]


def test_a_job_with_nothing_against_it_has_no_warnings(tmp_path: Path) -> None:
    assert put(FarmAtRest(tmp_path)).json()["warnings"] == []


def test_a_manifest_becomes_a_job_and_the_farm_is_told(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    answer = put(farm)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert (made["job"], made["outcome"], made["state"], made["images"]) == ("captions", "created", "open", 2)
    assert (made["owner"], made["model"], made["done"], made["said_last"]) == ("me", "sketch", 0, None)
    assert answer.headers["location"] == "/v1/jobs/captions"
    assert farm.told == ["captions"]
    plan = farm.ledger.plan("captions")
    assert plan.owner == "me"
    assert plan.numerics.device == "cpu"
    assert farm.ledger.open_jobs() == ["captions"]


def test_the_same_manifest_again_is_the_same_job(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    first = put(farm).json()
    for _ in range(2):
        again = put(farm)
        assert again.status_code == 200
        assert again.json() == first | {"outcome": "resumed"}
    posted = asking(farm, lambda client: client.post("/v1/jobs", json=MANIFEST))
    assert (posted.status_code, posted.json()["runs"]) == (200, first["runs"])
    assert len(farm.ledger.plans("captions")) == 1


def test_another_manifest_under_the_name_is_refused_with_what_changed(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    put(farm)
    answer = put(farm, MANIFEST | {"prompts": ["a red square", "a green circle"]})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "plan_changed"
    assert "captions exists and was planned from something else: prompts" in message(answer)
    assert farm.told == ["captions"]


@pytest.mark.parametrize(
    "kind", ["application/yaml", "text/yaml", "Application/YAML; charset=utf-8", "application/x-yaml"]
)
def test_yaml_makes_the_same_job(tmp_path: Path, kind: str) -> None:
    farm = FarmAtRest(tmp_path)
    answer = asking(farm, lambda client: client.post("/v1/jobs", content=YAML, headers={"content-type": kind}))
    assert answer.status_code == 201, answer.text
    assert put(farm).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "application/yaml; charset=utf-16"}, 415),
        ({"content-type": "application/yaml", "content-encoding": "gzip"}, 415),
    ],
)
def test_other_kinds_of_bodies_are_refused(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    farm = FarmAtRest(tmp_path)
    answer = asking(farm, lambda client: client.post("/v1/jobs", content=YAML, headers=headers))
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert farm.ledger.jobs() == []


def test_a_body_without_a_type_or_without_anything_is_refused(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    assert asking(farm, lambda client: client.post("/v1/jobs")).status_code == 415
    headers = {"content-type": "application/json"}
    empty = asking(farm, lambda client: client.post("/v1/jobs", headers=headers))
    assert (empty.status_code, message(empty)) == (400, "the body is empty; send a manifest in it")


def test_a_body_that_is_too_large_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 2**20
            yield b" " * 2**20

    headers = {"content-type": "application/yaml"}
    answer = asking(farm, lambda client: client.post("/v1/jobs", content=endless(), headers=headers))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert message(answer) == "a manifest has at most 2 MiB in application/yaml; send it as JSON"
    assert sent <= manifests.MAX_YAML_BYTES + 2 * 2**20


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (
            MANIFEST | {"model": "nothing"},
            404,
            "manifest: no model card is called 'nothing'; known here: ",
        ),
        (MANIFEST | {"model": "../sketch"}, 404, "no model card is called '../sketch'"),
        (MANIFEST | {"prompts": {"file": "/etc/passwd"}}, 400, "a manifest sent over HTTP reads no files here"),
        (MANIFEST | {"prompts": {"file": "file:///etc/passwd"}}, 400, "reads no files here"),
        (MANIFEST | {"name": "other"}, 400, "name: is 'other', and the address says 'captions'"),
        (MANIFEST | {"prompts": []}, 400, "prompts: must not be empty"),
        (MANIFEST | {"seeds": {"count": 10**30}}, 400, "seeds.count"),
        (MANIFEST | {"params": {"width": 10**9}}, 400, "width"),
        (MANIFEST | {"sweep": {"guidance_scale": [x / 10 for x in range(10_001)]}}, 400, "10001 points, at most 10000"),
        (MANIFEST | {"seeds": {"count": 1_000_000}, "prompts": ["x"] * 2000}, 400, "a job has at most 1,000,000,000"),
        (MANIFEST | {"finish_by": "2026-01-01T00:00Z"}, 400, "has passed"),
        (MANIFEST | {"owner": "root"}, 400, "unknown key `owner`; the owner is a setting"),
        ([MANIFEST], 400, "is an object of keys and values, got a list"),
        (7, 400, "got a single value"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_and_leaves_nothing(
    tmp_path: Path, body: Any, status: int, text: str
) -> None:
    farm = FarmAtRest(tmp_path)
    answer = put(farm, body)
    assert answer.status_code == status, answer.text
    assert text in message(answer)
    assert list(farm.ledger.store.list("jobs/")) == []
    assert farm.told == []


@pytest.mark.parametrize("name", ["Captions", "a.b", "-a", "x" * 64, "%2e%2e", "a%00b", "ü", "a b"])
def test_a_name_that_no_job_may_have_is_refused(tmp_path: Path, name: str) -> None:
    farm = FarmAtRest(tmp_path)
    nameless = {key: value for key, value in MANIFEST.items() if key != "name"}
    answer = put(farm, nameless, name=name)
    assert answer.status_code in (400, 404), answer.text
    assert farm.ledger.jobs() == []
    assert get(farm, f"/v1/jobs/{name}").status_code in (400, 404)


def test_the_address_gives_the_name(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    nameless = {key: value for key, value in MANIFEST.items() if key != "name"}
    assert put(farm, nameless).json()["job"] == "captions"


def test_prompts_come_from_an_allowed_prefix_alone(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path, http_sources=("s3://captions/public/",))
    answer = put(farm, MANIFEST | {"prompts": {"file": "s3://captions/private/a.txt"}})
    assert answer.status_code == 400
    assert "must lie below s3://captions/public/, got 's3://captions/private/a.txt'" in message(answer)


def test_nothing_is_planned_before_a_renderer_has_come(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    farm.machine = None
    answer = put(farm)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "farm_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert farm.ledger.jobs() == []


def test_a_job_is_taken_although_the_dispatcher_goes_away_before_it_is_told(tmp_path: Path) -> None:
    class Going(FarmAtRest):
        async def pool(self):
            found = await super().pool()
            self.away = True
            return found

    farm = Going(tmp_path)
    answer = put(farm)
    assert answer.status_code == 201
    assert farm.told == []
    assert farm.ledger.open_jobs() == ["captions"]


def test_a_farm_that_is_away_refuses_a_manifest_with_when_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.server.gateway.AWAY_PAUSES_S", (60.0,))
    farm = FarmAtRest(tmp_path)
    farm.away = True
    answer = put(farm)
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert farm.ledger.jobs() == []


def test_the_owner_is_the_keys_and_others_may_not_submit_over_it(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    ann, bob, root = farm.key("ann", "render"), farm.key("bob", "render"), farm.key("root", "admin")
    reader = farm.key("ann", "read")
    assert put(farm, key=reader).status_code == 403
    assert put(farm, key=ann).json()["owner"] == "ann"
    answer = put(farm, key=bob)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert put(farm, MANIFEST | {"priority": 90}, key=bob).status_code == 403
    assert put(farm, MANIFEST | {"priority": 90}, key=root).json()["changed"] == ["priority: 50 -> 90"]
    assert farm.ledger.controls("captions")[-1].by == "root"
    assert get(farm, "/v1/jobs/captions", key=bob).json()["owner"] == "ann"


def test_a_days_quota_counts_new_images_alone(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    key = farm.key("ann", "render", allowance=Allowance(images_per_day=3))
    assert put(farm, key=key).status_code == 201
    assert put(farm, key=key).status_code == 200
    assert [images for _, images in farm.charged] == [2]
    farm.refusal = Refusal("quota", "key has used up its 3 images of today", 3600.0)
    answer = put(farm, MANIFEST | {"name": "more"}, name="more", key=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "limited")
    assert answer.headers["retry-after"] == "3600"
    assert farm.ledger.jobs() == ["captions"]
    assert put(farm, key=key).status_code == 200


def test_a_new_priority_is_said_to_the_job(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    put(farm)
    answer = put(farm, MANIFEST | {"priority": 80, "budget": {"images": 100}})
    assert answer.status_code == 200
    assert answer.json()["changed"] == ["priority: 50 -> 80", "budget.images: none -> 100"]
    assert (answer.json()["priority"], answer.json()["max_images"]) == (80, 100)


# Reading


def test_a_job_is_shown_as_farm_status_has_it(tmp_path: Path) -> None:
    farm = finished(tmp_path, failed={3})
    found = get(farm, "/v1/jobs/shapes").json()
    live = found.pop("live")
    assert found == json.loads(job_record(job_status(farm.ledger, "shapes")).model_dump_json())
    assert (found["state"], found["images"], found["failed"]) == ("done", 10, 1)
    assert live["state"] == "done"
    assert live["live"] is False
    assert live["fraction"] == 1.0


def test_an_unknown_job_is_not_found(tmp_path: Path) -> None:
    farm = finished(tmp_path)
    for path in ("", "/images", "/sheet", "/events", "/images/0/content"):
        answer = get(farm, f"/v1/jobs/shape{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_job"), path
        assert "did you mean 'shapes'?" in message(answer)
    for word in ("pause", "resume", "cancel", "approve", "retry"):
        assert post(farm, f"/v1/jobs/shape/{word}").status_code == 404
    assert post(farm, "/v1/jobs/shape/change", {"priority": 1}).status_code == 404


def jobs_at(folder: Path, names: dict[str, str], **fields: Any) -> FarmAtRest:
    farm = FarmAtRest(folder)
    for name, at in names.items():
        plan = make_plan(job=name, **fields).model_copy(update={"created_at": at, "owner": name[0]})
        farm.ledger.create_plan(plan, 1)
        farm.ledger.open(name)
    return farm


def test_jobs_are_listed_newest_first_in_pages(tmp_path: Path) -> None:
    days = {
        f"{name}-job": f"2026-11-{day:02d}T10:00:00+00:00" for name, day in zip("cabed", (3, 9, 1, 5, 9), strict=True)
    }
    farm = jobs_at(tmp_path, days)

    async def pages(client):
        found, cursor = [], None
        while True:
            page = (await client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))).json()
            assert (page["object"], page["damaged"], len(page["data"])) == ("list", [], min(2, 5 - len(found)))
            found += [one["job"] for one in page["data"]]
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    assert asking(farm, pages) == ["d-job", "a-job", "e-job", "c-job", "b-job"]
    assert [one["job"] for one in get(farm, "/v1/jobs", owner="e").json()["data"]] == ["e-job"]
    assert get(farm, "/v1/jobs", state="done").json()["data"] == []
    assert get(farm, "/v1/jobs", model="other").json() == {
        "object": "list",
        "data": [],
        "damaged": [],
        "next_cursor": None,
    }


def test_a_damaged_job_hides_no_other(tmp_path: Path) -> None:
    farm = jobs_at(tmp_path, {"a": "2026-11-01T10:00:00+00:00", "b": "2026-11-02T10:00:00+00:00"})
    farm.ledger.store.put("jobs/b/plans/0001.json", b"{}")
    page = get(farm, "/v1/jobs").json()
    assert [one["job"] for one in page["data"]] == ["a"]
    assert [(one["job"], one["code"]) for one in page["damaged"]] == [("b", "record")]


def test_cursors_that_are_nonsense_are_refused(tmp_path: Path) -> None:
    farm = finished(tmp_path)
    for cursor in ("x", "", "7", "\0", "ü", "a" * 400):
        for path in ("/v1/jobs", "/v1/jobs/shapes/images"):
            answer = get(farm, path, cursor=cursor)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cursor"), cursor
    for cursor in ("0a1b2c3d:-1", "0a1b2c3d:٣", "0a1b2c3d:1e3", "ffffffff:0", ":1", "0a1b2c3d:" + "9" * 300):
        assert get(farm, "/v1/jobs/shapes/images", cursor=cursor).status_code == 400, cursor
    assert get(farm, "/v1/jobs/shapes/images", cursor="0a1b2c3d:999999999").json()["data"] == []
    assert get(farm, "/v1/jobs", cursor="a" * 501).status_code == 400


def test_a_jobs_images_come_in_order_in_pages_with_links(tmp_path: Path) -> None:
    farm = finished(tmp_path, failed={3})

    async def pages(client):
        found, cursor = [], None
        while True:
            query = {"limit": 3} | ({"cursor": cursor} if cursor else {})
            page = (await client.get("/v1/jobs/shapes/images", params=query)).json()
            found += page["data"]
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    found = asking(farm, pages)
    assert [one["index"] for one in found] == list(range(10))
    assert found[3]["status"] == "failed"
    assert found[3]["url"] is None
    assert found[3]["error_code"] == "render"
    first = found[0]
    assert first["url"] == "http://127.0.0.1:8000/v1/jobs/shapes/images/0/content?run=0a1b2c3d"
    assert (first["prompt"], first["run"], first["pass_number"], first["carry"]) == (
        "shape number 0",
        "0a1b2c3d",
        1,
        {},
    )
    assert "object" not in first
    assert "thumbnail" not in first
    failed = get(farm, "/v1/jobs/shapes/images", status="failed").json()
    assert ([one["index"] for one in failed["data"]], failed["next_cursor"]) == ([3], None)


def test_images_of_an_open_job_are_those_that_landed(tmp_path: Path) -> None:
    farm = finished(tmp_path, shards=2)
    page = get(farm, "/v1/jobs/shapes/images").json()
    assert [one["index"] for one in page["data"]] == list(range(8))
    assert page["next_cursor"] is None


def test_a_later_pass_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    farm = finished(tmp_path, failed={3, 9})
    plan = farm.ledger.plan("shapes")
    farm.ledger.open_pass(plan, 2, farm.ledger.failed_indexes(plan))
    commit_shard(farm.ledger, plan, 0, pass_number=2)
    found = get(farm, "/v1/jobs/shapes/images").json()["data"]
    assert [(one["index"], one["pass_number"]) for one in found if one["pass_number"] == 2] == [(3, 2), (9, 2)]
    assert {one["status"] for one in found} == {"ok"}


def test_images_of_several_runs_follow_one_another(tmp_path: Path) -> None:
    farm = finished(tmp_path, rows=2)
    ledger = farm.ledger
    second = make_plan(rows=1, run="ffff0000").model_copy(update={"appended_to": "0a1b2c3d"})
    ledger.create_plan(second, 2)
    render_pass(ledger, second, 1)
    found = get(farm, "/v1/jobs/shapes/images", limit=3).json()
    assert [(one["run"], one["index"]) for one in found["data"]] == [("0a1b2c3d", n) for n in range(3)]
    rest = get(farm, "/v1/jobs/shapes/images", cursor=found["next_cursor"]).json()
    assert [(one["run"], one["index"]) for one in rest["data"]] == [("0a1b2c3d", 3), ("ffff0000", 0), ("ffff0000", 1)]
    assert len(get(farm, "/v1/jobs/shapes/images", run="ffff0000").json()["data"]) == 2
    answer = get(farm, "/v1/jobs/shapes/images/0/content")
    assert answer.status_code == 400
    assert "has 2 runs; say run=0a1b2c3d or ffff0000" in message(answer)


def test_a_carried_value_that_json_has_not_is_null(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    plan = make_plan()
    farm.ledger.create_plan(plan, 1)
    commit_shard(farm.ledger, plan, 0, carry={0: {"score": float("nan")}, 1: {"score": 2.5}})
    found = get(farm, "/v1/jobs/shapes/images").json()["data"]
    assert [one["carry"]["score"] for one in found[:2]] == [None, 2.5]


def test_a_page_passes_over_what_is_not_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = FarmAtRest(tmp_path)
    plan = make_plan(rows=1000)
    farm.ledger.create_plan(plan, 1)
    commit_shard(farm.ledger, plan, 490)
    found = get(farm, "/v1/jobs/shapes/images", limit=2).json()
    assert [one["index"] for one in found["data"]] == [1960, 1961]
    monkeypatch.setattr("farm.server.rows.WINDOWS", 1)
    empty = get(farm, "/v1/jobs/shapes/images", limit=2).json()
    assert (empty["data"], empty["next_cursor"]) == ([], "0a1b2c3d:1")


def test_a_picture_is_the_file_as_it_was_rendered(tmp_path: Path) -> None:
    farm = finished(tmp_path, failed={3})
    answer = get(farm, "/v1/jobs/shapes/images/4/content")
    assert (answer.status_code, answer.content) == (200, picture_bytes(4))
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    etag = answer.headers["etag"]
    again = asking(farm, lambda client: client.get("/v1/jobs/shapes/images/4/content", headers={"if-none-match": etag}))
    assert (again.status_code, again.content) == (304, b"")
    assert "image 3 of shapes failed" in message(get(farm, "/v1/jobs/shapes/images/3/content"))
    assert "has no thumbnail" in message(get(farm, "/v1/jobs/shapes/images/4/content", thumbnail=True))
    assert get(farm, "/v1/jobs/shapes/images/3/content").status_code == 404
    for index, status in (("10", 400), ("-1", 400), ("x", 400), ("9" * 40, 400)):
        assert get(farm, f"/v1/jobs/shapes/images/{index}/content").status_code == status


def test_a_picture_that_is_gone_is_not_found(tmp_path: Path) -> None:
    farm = finished(tmp_path)
    farm.ledger.store.delete(farm.ledger.receipt(farm.ledger.plan("shapes"), 1, 0).rows[0].object)
    answer = get(farm, "/v1/jobs/shapes/images/0/content")
    assert answer.status_code == 404
    assert "farm verify shapes says more" in message(answer)


def test_the_sheet_is_there_when_a_pass_has_ended(tmp_path: Path) -> None:
    farm = finished(tmp_path, shards=2)
    answer = get(farm, "/v1/jobs/shapes/sheet")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "control")
    plan = farm.ledger.plan("shapes")
    commit_shard(farm.ledger, plan, 2)
    finalise(farm.ledger, plan, 1)
    answer = get(farm, "/v1/jobs/shapes/sheet")
    assert answer.status_code == 200
    assert answer.content[:8] == b"\x89PNG\r\n\x1a\n"
    again = asking(
        farm, lambda client: client.get("/v1/jobs/shapes/sheet", headers={"if-none-match": answer.headers["etag"]})
    )
    assert again.status_code == 304


# A farm that stopped a job


def stalled(folder: Path) -> FarmAtRest:
    farm = finished(folder, shards=1)
    message = f"{farm.ledger.store.url}/jobs/shapes/x: Permission denied; give this user the right"
    live = JobProgress("shapes", "r", 1, "stalled", 10, 4, 0, 0.4, None, None, 1, 0, message, {})
    farm.progresses["shapes"], farm.stall_codes["shapes"] = live, "store_denied"
    return farm


def test_a_job_that_the_farm_stopped_is_shown_as_such(tmp_path: Path) -> None:
    farm = stalled(tmp_path)
    for job in (get(farm, "/v1/jobs/shapes").json(), get(farm, "/v1/jobs").json()["data"][0]):
        assert (job["state"], job["live"]["state"], job["live"]["code"]) == ("open", "stalled", "store_denied")
        assert job["live"]["message"] == "the store/jobs/shapes/x: Permission denied; give this user the right"
    farm.away = True
    assert get(farm, "/v1/jobs").json()["data"][0]["live"] is None


def test_resume_has_the_farm_try_again(tmp_path: Path) -> None:
    farm = stalled(tmp_path)
    said = post(farm, "/v1/jobs/shapes/resume").json()
    assert said["message"] == "shapes was neither paused nor cancelled; a farm that had stopped it tries again"
    assert said["control"] is None
    assert farm.told == ["shapes"]


def test_a_store_that_cannot_be_written_is_told_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm = finished(tmp_path, shards=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreDeniedError(f"{tmp_path}/store/.farm/tmp-1: Read-only file system; give this user the right")

    monkeypatch.setattr(farm.ledger, "append_control", refuse)
    answer = post(farm, "/v1/jobs/shapes/pause")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert message(answer) == "the farm's store cannot be written at the moment; tell its operator"


@pytest.mark.parametrize("body", [b'{"priority": 1, "priority": 2}', b"\xff", b"[" * 100_000])
def test_what_is_said_to_a_job_is_read_strictly(tmp_path: Path, body: bytes) -> None:
    farm = finished(tmp_path, shards=1)
    kind = {"content-type": "application/json"}
    answer = asking(farm, lambda client: client.post("/v1/jobs/shapes/change", content=body, headers=kind))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request")
    assert farm.told == []


# Controls


def test_people_pause_resume_cancel_and_change_a_job(tmp_path: Path) -> None:
    farm = finished(tmp_path, shards=1)
    paused = post(farm, "/v1/jobs/shapes/pause").json()
    assert (paused["job"], paused["state"], paused["control"]["action"], paused["control"]["by"]) == (
        "shapes",
        "paused",
        "pause",
        "me",
    )
    assert paused["control"]["at"] == "2026-11-18T11:06:40+00:00"
    assert post(farm, "/v1/jobs/shapes/pause", {}).json()["control"] is None
    assert post(farm, "/v1/jobs/shapes/resume").json()["state"] == "open"
    changed = post(farm, "/v1/jobs/shapes/change", {"priority": 70, "max_images": 5, "gpu_hours": 2}).json()
    assert changed["message"] == "shapes: priority: 50 -> 70; budget.gpu_hours: none -> 2; budget.images: none -> 5"
    assert post(farm, "/v1/jobs/shapes/cancel").json()["state"] == "cancelled"
    assert get(farm, "/v1/jobs/shapes").json()["said_last"]["action"] == "cancel"
    assert farm.told == ["shapes"] * 5


def test_what_cannot_be_said_to_a_job_is_a_conflict(tmp_path: Path) -> None:
    farm = finished(tmp_path)
    for word in ("pause", "resume", "cancel", "approve"):
        answer = post(farm, f"/v1/jobs/shapes/{word}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "control"), word
    assert message(post(farm, "/v1/jobs/shapes/pause")) == "shapes is done, 10 images; there is nothing to pause"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"priority": 101},
        {"priority": "7"},
        {"priority": True},
        {"gpu_hours": 0},
        {"max_images": 1.5},
        {"owner": "me"},
        {"finish_by": "x" * 200},
        [],
        7,
    ],
)
def test_changes_that_cannot_be_are_refused(tmp_path: Path, body: Any) -> None:
    farm = finished(tmp_path, shards=1)
    assert post(farm, "/v1/jobs/shapes/change", body).status_code == 400
    assert farm.ledger.controls("shapes") == []


def test_a_finish_by_that_is_none_is_refused(tmp_path: Path) -> None:
    farm = finished(tmp_path, shards=1)
    answer = post(farm, "/v1/jobs/shapes/change", {"finish_by": "tomorrow"})
    assert answer.status_code in (400, 409)
    assert "must be a moment such as" in message(answer)


def test_a_pilot_is_approved(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    plan = make_plan(pilot=4)
    farm.ledger.create_plan(plan, 1)
    render_pass(farm.ledger, plan, 1)
    assert get(farm, "/v1/jobs/shapes").json()["state"] == "pilot"
    approved = post(farm, "/v1/jobs/shapes/approve").json()
    assert approved["message"] == "shapes is approved; its other 6 images follow"
    assert farm.ledger.open_jobs() == ["shapes"]


def test_only_its_owner_or_an_administrator_speaks_to_a_job(tmp_path: Path) -> None:
    farm = jobs_at(tmp_path, {"captions": "2026-11-01T10:00:00+00:00"})  # c's
    owner, other, root = farm.key("c", "render"), farm.key("bob", "render"), farm.key("root", "admin")
    reader = farm.key("c", "read")
    for key in (other, reader):
        for word in ("pause", "resume", "cancel", "approve", "retry"):
            assert post(farm, f"/v1/jobs/captions/{word}", key=key).status_code == 403
        assert post(farm, "/v1/jobs/captions/change", {"priority": 1}, key=key).status_code == 403
    assert farm.ledger.controls("captions") == []
    assert farm.told == []
    assert post(farm, "/v1/jobs/captions/pause", key=owner).json()["control"]["by"] == "c"
    assert post(farm, "/v1/jobs/captions/resume", key=root).json()["control"]["by"] == "root"
    assert asking(farm, lambda client: client.get("/v1/jobs")).status_code in (200, 401)


def test_failed_images_are_rendered_again(tmp_path: Path) -> None:
    farm = finished(tmp_path, failed={3, 9})
    answer = post(farm, "/v1/jobs/shapes/retry")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "job": "shapes",
        "reopened": 2,
        "unfinished": False,
        "resumed": False,
        "message": "2 failed images of shapes will be rendered again",
    }
    assert farm.ledger.passes(farm.ledger.plan("shapes")) == 2
    assert farm.ledger.open_jobs() == ["shapes"]
    assert farm.told == ["shapes"]


@pytest.mark.parametrize(
    ("body", "reopened"),
    [
        ({"which": "all"}, 10),
        ({"images": [1, 5]}, 2),
        ({"images": "1,5-7"}, 4),
        ({"images": [2], "run": "0a1b2c3d"}, 1),
    ],
)
def test_images_that_are_listed_are_rendered_again(tmp_path: Path, body: Any, reopened: int) -> None:
    assert post(finished(tmp_path), "/v1/jobs/shapes/retry", body).json()["reopened"] == reopened


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"which": "some"}, 400),
        ({"which": "all", "images": [1]}, 400),
        ({"images": [-1]}, 400),
        ({"images": [2**63]}, 400),
        ({"images": ["1"]}, 400),
        ({"images": []}, 409),
        ({"images": [10]}, 409),
        ({"images": "x"}, 409),
        ({"images": "0-99999999999"}, 409),
        ({"run": "ffffffff"}, 409),
        ({"damaged": "yes"}, 400),
        ({"force": True}, 400),
    ],
)
def test_a_retry_that_cannot_be_is_refused(tmp_path: Path, body: Any, status: int) -> None:
    farm = finished(tmp_path)
    assert post(farm, "/v1/jobs/shapes/retry", body).status_code == status
    assert farm.ledger.passes(farm.ledger.plan("shapes")) == 1


def test_too_many_at_once_are_told_to_come_later(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)

    async def ask(client):
        await client.get("/v1/jobs")
        farm.app.state.job_room.planning = Threads("planning", count=1, most=2)
        return await asyncio.gather(
            *(client.put(f"/v1/jobs/j-{n}", json=MANIFEST | {"name": f"j-{n}"}) for n in range(6))
        )

    answers = asking(farm, ask)
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {201, 503}
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert (busy.json()["error"]["code"], busy.headers["retry-after"]) == ("busy", "5")


def test_manifests_that_arrive_slowly_fill_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.server.jobs.MANIFESTS", 1)
    farm = FarmAtRest(tmp_path)
    more, begun = asyncio.Event(), asyncio.Event()

    async def slow():
        yield YAML[:20].encode()
        begun.set()
        await more.wait()
        yield YAML[20:].encode()

    async def ask(client):
        first = asyncio.create_task(client.post("/v1/jobs", content=slow(), headers={"content-type": "text/yaml"}))
        await begun.wait()
        while not (hasattr(farm.app.state, "job_room") and farm.app.state.job_room.manifests):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        second = await client.put("/v1/jobs/captions", json=MANIFEST)
        more.set()
        return (await first), second, await client.put("/v1/jobs/captions", json=MANIFEST)

    assert [answer.status_code for answer in asking(farm, ask)] == [201, 503, 200]


def test_a_store_that_is_away_is_told_as_such(tmp_path: Path) -> None:
    class Away(LocalStore):
        def folders(self, prefix: str):
            raise StoreUnavailableError("the store does not answer")

    farm = FarmAtRest(tmp_path, store=Away(tmp_path / "store"))
    answer = get(farm, "/v1/jobs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert "retry-after" in answer.headers


def test_plans_that_are_kept_in_memory_follow_the_store(tmp_path: Path) -> None:
    farm = finished(tmp_path)
    assert len(get(farm, "/v1/jobs/shapes/images").json()["data"]) == 10
    delete_job(farm.ledger, "shapes", at="2026-11-18T11:06:40+00:00", by="me", stop_s=0.0)
    assert get(farm, "/v1/jobs/shapes/images").status_code == 404
    Ledger(farm.ledger.store).create_plan(make_plan(run="eeeeeeee", rows=1), 1)
    assert get(farm, "/v1/jobs/shapes/images").json()["data"] == []
