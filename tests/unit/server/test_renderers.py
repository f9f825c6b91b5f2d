"""Renderers over HTTP."""

from pathlib import Path

from farm.errors import FarmUnavailableError
from tests.unit.server.farm_at_rest import FarmAtRest, asking


def test_renderers_are_listed_with_what_they_do(tmp_path: Path) -> None:
    answer = asking(FarmAtRest(tmp_path), lambda client: client.get("/v1/renderers"))
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "list",
        "data": [
            {
                "name": "renderer-0",
                "state": "rendering",
                "device": "CPU",
                "loaded": "sketch",
                "job": "captions",
                "urgent": 2,
                "reserved": False,
            },
            {
                "name": "renderer-1",
                "state": "idle",
                "device": "CPU",
                "loaded": None,
                "job": None,
                "urgent": 0,
                "reserved": True,
            },
        ],
        "next_cursor": None,
        "waiting": 2,
        "capacity": 512,
    }


def test_a_renderer_is_drained_and_given_work_again(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)

    async def ask(client):
        drained = await client.post("/v1/renderers/renderer-1/drain", json={})
        again = await client.post("/v1/renderers/renderer-1/resume")
        return drained, again

    drained, again = asking(farm, ask)
    assert (drained.status_code, drained.json()["state"]) == (200, "drained")
    assert (again.status_code, again.json()["state"]) == (200, "idle")


def test_an_unknown_renderer_is_not_found(tmp_path: Path) -> None:
    answer = asking(FarmAtRest(tmp_path), lambda client: client.post("/v1/renderers/renderer-9/drain"))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_renderer"
    assert answer.json()["error"]["message"] == "no renderer 'renderer-9'; there are renderer-0, renderer-1"


def test_only_administrators_drain(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    key = farm.key("ann", "render")
    answer = asking(farm, lambda client: client.post("/v1/renderers/renderer-1/drain"), key=key)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden"
    assert asking(farm, lambda client: client.get("/v1/renderers"), key=key).status_code == 200


def test_what_else_is_said_is_refused(tmp_path: Path) -> None:
    farm = FarmAtRest(tmp_path)
    answer = asking(farm, lambda client: client.post("/v1/renderers/renderer-1/drain", json={"force": True}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "force"
    answer = asking(farm, lambda client: client.post("/v1/renderers/renderer-1/drain", json=[]))
    assert answer.status_code == 400


def test_a_farm_that_stays_away_is_told_with_when_to_ask_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("farm.server.gateway.AWAY_PAUSES_S", (0.001,))
    farm = FarmAtRest(tmp_path)
    calls = 0

    async def away() -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise FarmUnavailableError("the dispatcher is away")
        return await type(farm).pool(farm)

    monkeypatch.setattr(farm, "pool", away)
    assert asking(farm, lambda client: client.get("/v1/renderers")).status_code == 200
    assert calls == 4
